"""Numbers about models, by hand."""

import math

import pytest
import torch
from testing import randn, tensor
from torch import nn

from divqat import metrics
from divqat.victim import Victim


def test_predict_gives_logits_of_any_model():
    images = torch.randint(256, (7, 1, 2, 2), dtype=torch.uint8)
    wanted = images.flatten(1) / 127.5 - 1
    torch.testing.assert_close(
        metrics.predict(nn.Flatten().eval(), images, batch_size=3), wanted, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        metrics.predict(lambda x: x.flatten(1), images), wanted, rtol=0, atol=1e-6
    )


def test_predict_refuses_what_gives_wrong_numbers():
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="training mode"):
        metrics.predict(nn.Flatten(), images)
    with pytest.raises(TypeError, match="uint8"):
        metrics.predict(nn.Flatten().eval(), images.float())
    with pytest.raises(ValueError, match="images: wanted"):
        metrics.predict(nn.Flatten().eval(), images[:0])
    with pytest.raises(FloatingPointError):
        metrics.predict(lambda x: x.flatten(1) / 0 * 0, images)


def test_metrics_by_hand():
    probs = tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [1, 0, 0], [0.3, 0.3, 0.4]])
    labels = torch.tensor([0, 1, 2, 2])
    assert metrics.accuracy(probs, labels) == 0.75
    assert metrics.fidelity(probs, 10 * probs) == 1
    assert metrics.fidelity(probs, probs.roll(2, dims=0)) == 0.5  # 0 1 0 2 beside 0 2 0 1
    assert metrics.mean_top_probability(probs) == pytest.approx(0.725)
    h = [-sum(p * math.log(p) for p in row if p > 0) for row in probs.tolist()]
    assert metrics.entropy(probs) == pytest.approx(sum(h) / 4)
    assert metrics.chance(labels) == 0.5


def test_softmax_rows_sum_to_one():
    probs = metrics.softmax(100 * randn(5, 3))
    assert metrics.are_distributions(probs)


def test_are_distributions():
    assert not metrics.are_distributions(tensor([[0.5, 0.4]]))
    assert not metrics.are_distributions(tensor([[1.5, -0.5]]))


def test_is_deterministic():
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    assert metrics.is_deterministic(Victim(lambda x: x.flatten(1)), images)
    noisy = Victim(lambda x: x.flatten(1) + torch.rand(1, 4))
    assert not metrics.is_deterministic(noisy, images)
    assert noisy.queries == 4


def test_top_probability_histogram():
    histogram = metrics.top_probability_histogram(tensor([[1, 0], [0.52, 0.48], [0.03, 0.97]]))
    assert len(histogram) == 20
    assert (histogram[10], histogram[19], sum(histogram)) == (1, 2, 3)


def test_accuracy_wants_one_label_per_row():
    with pytest.raises(ValueError, match="outputs"):
        metrics.accuracy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
