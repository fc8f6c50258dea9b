"""The way from a defended network back to the undefended one is of networks that are whole."""

import pytest
import torch
from test_train import assert_equal
from testing import randn

from divqat.train import TrainConfig
from divqat.train.budget import between, move
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


def test_zero_points_go_with_their_ranges():
    start, end, model = observed(1), observed(2), observed(3)
    images = randn(64, 1, 8, 8)
    ends = start.state_dict(), end.state_dict()
    points = [name for name in ends[0] if name.endswith("zero_point")]
    assert sum(not ends[0][name].equal(ends[1][name]) for name in points) > 5
    for share, wanted in ((0, start), (1, end)):
        move(model, *ends, share)
        assert torch.equal(model(images), wanted(images))
    move(model, *ends, 0.5)
    moved, plain = model.state_dict(), between(*ends, 0.5)
    for name in points:
        scale = name.removesuffix("zero_point") + "scale"
        low = plain[name.removesuffix("zero_point") + "running_min"]
        assert moved[name] == -(low / plain[scale]).round() and ends[1][name] == plain[name]
        torch.testing.assert_close(moved[scale], plain[scale])
        assert moved[name] != plain[name] or torch.equal(moved[scale], plain[scale])


def test_without_zero_points_nothing_but_the_straight_way_is_gone():
    ends = [observed(seed, symmetric=True).state_dict() for seed in (1, 2)]
    model = observed(3, symmetric=True)
    move(model, *ends, 0.25)
    assert_equal(model.state_dict(), between(*ends, 0.25))
