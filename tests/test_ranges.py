"""The ranges of all observers as one vector, and a first look at a batch."""

import copy

import pytest
import torch
from testing import bits, randn
from torch import nn

import divqat
from divqat._util.settings import ConfigError
from divqat.nn import FakeQuantize, QuantSpec
from divqat.quantize import observe_first, sync_observers
from divqat.quantize.ranges import Ranges
from divqat.train import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
BUFFERS = ("running_min", "running_max", "scale", "zero_point")


def buffers(model):
    return [getattr(layer, name) for layer in model for name in BUFFERS]


def test_the_ranges_of_shards_merge_to_the_bits_of_the_whole():
    specs = [QuantSpec(signed=False, symmetric=False), QuantSpec(), QuantSpec(bits=4)]
    specs += [QuantSpec(symmetric=False, averaging_constant=0.3)]
    kinds = [dict(), dict(relu=True), dict(ch_axis=1, num_channels=5)]
    layers = [FakeQuantize(spec, mode="delayed", **kind) for spec in specs for kind in kinds]
    whole = nn.ModuleList([*layers, FakeQuantize()])  # the last one never sees anything
    for layer in layers:
        layer(randn(8, 5))
    parts = [copy.deepcopy(whole) for _ in range(3)]
    for step in range(1, 20):
        images = randn(30, 5, seed=step) * step**0.5 + 0.1
        for model, rows in zip([whole, *parts], [images, *images.split(10)], strict=True):
            for layer in model[:-1]:
                layer(rows)
        merged = torch.stack([Ranges(part).read() for part in parts]).amax(0)
        for part in parts:
            Ranges(part).write(merged)
            for got, wanted in zip(buffers(part), buffers(whole), strict=True):
                assert got.dtype == wanted.dtype and torch.equal(bits(got), bits(wanted))


def test_first_observation_moves_nothing_else():
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    model = nn.Sequential(layers, nn.Flatten(), nn.Linear(144, 2))
    model = divqat.prepare(model, "x86", torch.zeros(2, 1, 8, 8))
    before = copy.deepcopy(model.state_dict())
    observe_first(model, [randn(9, 1, 8, 8)])
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        if name.startswith("fake_quantize"):
            continue
        assert torch.equal(value, before[name]) if torch.is_tensor(value) else value == before[name]
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    assert all(q.has_range() and q.fake_quant_enabled for q in quantizers)
    ranges = Ranges(model).read()
    observe_first(model, [randn(9, 1, 8, 8) * 5])
    assert torch.equal(Ranges(model).read(), ranges)


def test_synchronising_wants_processes():
    with pytest.raises(ValueError, match=r"group: wanted an initialized torch\.distributed"):
        sync_observers(nn.Sequential(FakeQuantize()))


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="batch_size: wanted at least one image for each of 1"):
        TrainConfig(batch_size=3, accumulate=4)
    with pytest.raises(ConfigError, match="ranges: wanted delayed or auto with 1 processes"):
        TrainConfig(ranges="exact", accumulate=2)
    with pytest.raises(ConfigError, match=r"with 2 processes and accumulate = 1, got exact"):
        TrainConfig(ranges="exact").check_world_size(2)
