"""Interpolation between a defended and an undefended network gives consistent networks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train import assert_equal
from testing import randn
from torch import nn

from divqat.train import TrainConfig
from divqat.train.budget import STEPS, Budget, interpolate
from divqat.train.network import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


def observed(seed, symmetric=False):
    """A prepared network whose ranges, statistics and weights come from ``seed``."""
    quantization = dict(method="qat", teacher="a", preset="tensorrt" if symmetric else "x86")
    config = TrainConfig(**quantization, model="mobilenetv2_small", seed=seed)
    shape = dict(in_channels=1, num_classes=10, image_size=[8, 8])
    model = build_model(config, shape)
    for step in range(3):
        model(randn(32, 1, 8, 8, seed=10 * seed + step) + 0.4 * seed)
    return model.eval()


@pytest.mark.slow
def test_zero_points_follow_their_ranges():
    start, end, model = observed(1), observed(2), observed(3)
    images = randn(64, 1, 8, 8)
    ends = start.state_dict(), end.state_dict()
    points = [name for name in ends[0] if name.endswith("zero_point")]
    assert sum(not ends[0][name].equal(ends[1][name]) for name in points) > 5
    for share, wanted in ((0, start), (1, end)):
        model.load_state_dict(interpolate(*ends, share))
        assert torch.equal(model(images), wanted(images))
    plain = interpolate(*ends, 0.5)
    model.load_state_dict(plain)
    moved = model.state_dict()
    for name in points:
        scale = name.removesuffix("zero_point") + "scale"
        low = plain[name.removesuffix("zero_point") + "running_min"]
        assert moved[name] == -(low / plain[scale]).round() and ends[1][name] == plain[name]
        torch.testing.assert_close(moved[scale], plain[scale])


@pytest.mark.slow
def test_symmetric_ranges_are_interpolated():
    ends = [observed(seed, symmetric=True).state_dict() for seed in (1, 2)]
    model, wanted = observed(3, symmetric=True), interpolate(*ends, 0.25)
    model.load_state_dict(wanted)
    found = model.state_dict()
    ranges = [name for name in found if name.endswith("running_max")]
    scales = {name.replace("running_max", "scale") for name in ranges}
    assert_equal(*({k: v for k, v in s.items() if k not in scales} for s in (found, wanted)))
    for name in ranges:
        largest = torch.maximum(found[name], -found[name.replace("max", "min")])
        torch.testing.assert_close(found[name.replace("running_max", "scale")], largest / 127.5)


def test_interpolation_by_hand():
    start = {"weight": torch.tensor([1.0, -2.0, math.inf]), "count": torch.tensor(3)}
    end = {
        "weight": torch.tensor([2.0, 6.0, math.inf]),
        "count": torch.tensor(9),
        "own": torch.ones(1),
        "extra": {"a": 1},
    }
    there = interpolate(start, end, 0.25)
    assert there["weight"].tolist() == [1.25, 0.0, math.inf]
    assert there["count"] == 9 and there["own"] == 1 and there["extra"] == {"a": 1}


@given(pair=st.tuples(*[st.floats(-(2.0**99), 2.0**99, width=32)] * 2), share=st.floats(0, 1))
def test_interpolation_keeps_the_bits_of_both_ends_and_stays_between_them(pair, share):
    start, end = ({"w": torch.tensor([value])} for value in pair)
    assert interpolate(start, end, 0)["w"].equal(start["w"])
    assert interpolate(start, end, 1)["w"].equal(end["w"])
    low, high = sorted(pair)
    found = float(interpolate(start, end, share)["w"])
    rounding = 2e-7 * max(abs(low), abs(high))
    assert low - rounding <= found <= high + rounding


def settled(accuracy, points=2.0, reference=0.9):
    """A budget applied to a model with one weight, which training moved from 1 to 3. Its accuracy
    is a function of the share of that distance."""
    model = nn.Linear(1, 1, bias=False)
    budget = Budget(points, reference, {"weight": torch.ones(1, 1)})
    nn.init.constant_(model.weight, 3)
    shares = []

    def measure():
        share = (float(model.weight.detach()) - 1) / 2
        shares.append(share)
        return {"validation_accuracy": accuracy(share), "misled": share}

    budget.choose_weights(model, measure)
    share = (float(model.weight.detach()) - 1) / 2
    assert share == pytest.approx(budget.chosen["share"], abs=1e-6)
    assert shares == pytest.approx([1 - i / STEPS for i in range(len(shares))], abs=1e-6)
    assert [row["misled"] for row in budget.summary()["path"]][: len(shares)] == shares
    return budget


def test_the_first_within_the_budget_is_the_result_else_the_most_accurate():
    assert settled(lambda share: 0.88).chosen["share"] == 1  # exactly at the limit
    budget = settled(lambda share: 0.9 - 0.08 * share)  # eight points below, two allowed
    assert budget.chosen["share"] == pytest.approx(0.25)
    assert budget.chosen["points_below"] == pytest.approx(2)
    assert budget.warning() is None and budget.summary()["inside"]
    # the search stops at the first one
    assert settled(lambda share: 0.9 - 0.04 * (share > 0.5)).chosen["share"] == 0.5
    budget = settled(lambda share: 0.8 - abs(share - 0.3))
    assert budget.chosen["share"] == pytest.approx(0.3)
    assert "wanted at most 2 points below 90.00%, got 10.00 at best" in budget.warning()
    assert not budget.summary()["inside"]
    budget = settled(lambda share: 0.9 if share == 0 else 0.1)
    assert budget.chosen["share"] == 0 and "nothing is left of the defense" in budget.warning()
