"""The expected calibration error, by hand and beside a loop in float64."""

import math

import pytest
import torch
from testing import randn, seeded, tensor

from divqat.metrics import expected_calibration_error as ece
from divqat.metrics import softmax


def two(confidence):
    """Rows whose largest probability, the first one, is as given."""
    top = tensor(confidence, torch.float64)
    return torch.stack([top, 1 - top], dim=1)


def labels(right):
    return torch.tensor([0 if r else 1 for r in right])


def test_by_hand():
    # Of two bins the upper one has all: 3 of 4 are right, sure of them 0.8 on average.
    assert ece(two([0.7, 0.7, 0.9, 0.9]), labels([1, 1, 1, 0]), bins=2) == pytest.approx(0.05)
    # Of ten: (0.6, 0.7] is right for 2 of 2, (0.8, 0.9] for 1 of 2, all others are empty.
    wanted = (2 * abs(1 - 0.7) + 2 * abs(0.5 - 0.85)) / 4
    got = ece(two([0.7 - 1e-9, 0.7 - 1e-9, 0.85, 0.85]), labels([1, 1, 1, 0]), bins=10)
    assert got == pytest.approx(wanted)


def test_one_image():
    assert ece(two([0.8]), labels([1])) == pytest.approx(0.2)
    assert ece(two([0.8]), labels([0])) == pytest.approx(0.8)
    assert ece(two([1.0]), labels([1])) == 0
    assert ece(two([1.0]), labels([0])) == 1


def test_a_value_on_a_border_is_in_the_lower_bin():
    # 0.75 is the border of (0.5, 0.75] and (0.75, 1]: beside 0.6, and not beside 1, it makes good
    # what that is short of.
    right = labels([1, 0, 1])
    apart = (abs(1 + 0 - 0.6 - 0.75) + 0) / 3
    assert ece(two([0.6, 0.75, 1.0]), right, bins=4) == pytest.approx(apart)
    other = (abs(1 - 0.6) + abs(0 + 1 - 0.75 - 1e-9 - 1.0)) / 3
    assert ece(two([0.6, 0.75 + 1e-9, 1.0]), right, bins=4) == pytest.approx(other)
    assert abs(apart - other) > 0.2


def test_equal_probabilities_answer_the_lower_class():
    assert ece(two([0.5]), torch.tensor([0])) == 0.5
    assert ece(two([0.5]), torch.tensor([1])) == 0.5
    thirds = torch.full((1, 4), 0.25)
    assert ece(thirds, torch.tensor([0])) == 0.75
    assert ece(thirds, torch.tensor([3])) == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [1, 2, 15, 40])
def test_beside_a_loop(dtype, bins):
    probs = (2 * randn(500, 7, dtype=dtype)).softmax(1)
    target = torch.arange(500) % 7
    rows = [(max(row), row.index(max(row)) == t) for row, t in
            zip(probs.double().tolist(), target.tolist(), strict=True)]  # fmt: skip
    wanted = 0.0
    for m in range(1, bins + 1):
        some = [(p, r) for p, r in rows if (m - 1) / bins < p <= m / bins]
        if some:
            acc = math.fsum(r for _, r in some) / len(some)
            conf = math.fsum(p for p, _ in some) / len(some)
            wanted += len(some) / len(rows) * abs(acc - conf)
    assert ece(probs, target, bins=bins) == pytest.approx(wanted, abs=1e-13)


def test_a_calibrated_model_has_little_and_a_sharpened_one_more():
    logits = 2 * randn(20000, 5)
    target = torch.multinomial(softmax(logits), 1, generator=seeded(1))[:, 0]
    assert ece(softmax(logits), target) < 0.02
    assert ece(softmax(3 * logits), target) > 0.1
    assert ece(softmax(logits / 3), target) > 0.1


def test_mistakes_are_named():
    good = two([0.7, 0.8])
    for bad in (good.log(), good * torch.nan, good[:0], good[0], 2 * good):
        with pytest.raises(ValueError, match=r"probs: wanted \[N, num_classes\].* got \["):
            ece(bad, labels([1, 1]))
    with pytest.raises(ValueError, match="one per image"):
        ece(good, labels([1]))
    with pytest.raises(TypeError, match="int64"):
        ece(good, torch.zeros(2))
    with pytest.raises(ValueError, match="labels: wanted below 2, got 2"):
        ece(good, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="bins: wanted at least 1, got 0"):
        ece(good, labels([1, 1]), bins=0)
