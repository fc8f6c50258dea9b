"""summary: the numbers of a table worked by hand, and that measuring changes nothing."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from networks import build, images, settle
from testing import randn, tensor
from torch import nn

import divqat
from divqat.nn import FakeQuantize, QuantLinear, QuantSpec
from divqat.nn.spec import WEIGHT


def by_name(summary):
    return {row.layer: row for row in summary.rows}


def test_numbers_worked_by_hand():
    # Weight: int4 narrow, scale per row max / 7: row 0 (7, 3.4) -> scale 1, codes (7, 3), error
    # (0, 0.4); row 1 (0.7, 0.1) -> scale 0.1, no error.
    layer = QuantLinear(
        2, 2, bias=False,
        weight_spec=QuantSpec(bits=4, per_channel=True, narrow_range=True),
        input_spec=QuantSpec(bits=3, signed=False, symmetric=False),
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(tensor([[7.0, 3.4], [0.7, 0.1]]))
    layer(tensor([[0.0, 7.0]]))  # uint3 from 0 to 7: scale 1, zero point 0
    rows = by_name(divqat.summary(nn.Sequential(layer), tensor([[9.0, 2.2], [-0.4, 5.0]])))

    weight = rows["0"]
    assert (weight.kind, weight.bits) == (
        "weight",
        4,
    ) and "int4 symmetric, per channel" in weight.scheme
    assert (weight.scale_min, weight.scale_max) == pytest.approx((0.1, 1.0))
    assert weight.clipped == 0
    assert weight.sqnr_db == pytest.approx(10 * math.log10((49 + 3.4**2 + 0.5) / 0.16), rel=1e-4)

    # 9 is clipped to 7; -0.4 rounds to code 0, which is on the grid.
    read = rows["0.input_fake_quantize"]
    assert (read.kind, read.bits, read.scale_min, read.scale_max) == ("activation", 3, 1.0, 1.0)
    assert read.clipped == pytest.approx(1 / 4)
    signal, noise = 81 + 2.2**2 + 0.16 + 25, 4 + 0.04 + 0.16
    assert read.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-4)


def test_measures_the_folded_weight_of_conv_bn():
    prepared = settle(divqat.prepare(build("residual"), "x86", images()), 3)
    row = by_name(divqat.summary(prepared))["conv1"]
    folded = prepared.conv1.folded()[0].detach()
    scales = folded.abs().amax((1, 2, 3)) / WEIGHT.quant_max
    assert row.scale_max == pytest.approx(float(scales.max()), rel=1e-5)
    assert row.scale_min == pytest.approx(float(scales.min()), rel=1e-5)
    assert 29 < row.sqnr_db < 54  # 7 bits


def test_fewer_bits_lose_more():
    decibels = []
    for bits in (3, 4, 5, 6):
        config = divqat.preset("x86", weight_bits=bits, activation_bits=bits)
        prepared = settle(divqat.prepare(build("residual"), config, images()), 5)
        row = by_name(divqat.summary(prepared, images()))["conv2"]
        decibels.append(row.sqnr_db)
    steps = [b - a for a, b in itertools.pairwise(decibels)]
    assert all(4 < step < 10 for step in steps)  # 6 dB a bit


def test_does_not_change_the_model():
    prepared = settle(divqat.prepare(build("concat_hardswish"), "x86", images()), 2)
    prepared.conv1.bn.eval()
    modes = [module.training for module in prepared.modules()]
    before = copy.deepcopy(prepared.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in prepared.modules()]
    summary = divqat.summary(prepared, 10 * images())
    assert [module.training for module in prepared.modules()] == modes
    for key, value in prepared.state_dict().items():
        assert torch.equal(value, before[key]) if torch.is_tensor(value) else value == before[key]
    assert [len(module._forward_pre_hooks) for module in prepared.modules()] == hooks
    clipped = [row.clipped for row in summary.rows if row.kind == "activation"]
    assert max(clipped) > 0.1  # ten times the range that was observed


def test_before_calibration_there_is_no_scale_and_no_measurement():
    summary = divqat.summary(divqat.prepare(build("residual"), "x86", images()), images())
    for row in summary.rows:
        known = row.kind == "weight"
        assert (row.scale_min is not None) == (row.clipped is not None) == known
    json.dumps(summary.to_dict(), allow_nan=False)


def test_a_learned_weight_scale_is_not_known_before_a_batch():
    layer = QuantLinear(4, 4, weight_spec=QuantSpec(per_channel=True, learned=True))
    row = by_name(divqat.summary(nn.Sequential(layer)))["0"]
    assert row.scale_min is row.scale_max is row.clipped is row.sqnr_db is None
    layer(torch.ones(2, 4))
    assert by_name(divqat.summary(nn.Sequential(layer)))["0"].sqnr_db is not None


def test_channels_counted_from_the_end():
    def measured(axis):
        model = nn.Sequential(FakeQuantize(ch_axis=axis, num_channels=4))
        model(randn(3, 5, 4))
        return divqat.summary(model, randn(3, 5, 4)).rows

    assert measured(-1) == measured(2)


def test_table_has_a_line_for_each_tensor():
    prepared = settle(divqat.prepare(build("residual"), "x86", images()), 2)
    summary = divqat.summary(prepared, images())
    lines = str(summary).splitlines()
    assert lines[0].split() == ["layer", "tensor", "scheme", "scale", "clipped", "SQNR", "dB"]
    assert len(lines) == 2 + len(summary.rows)
    for line, row in zip(lines[2:], summary.rows, strict=True):
        assert line.startswith(row.layer) and row.scheme in line
        assert line.endswith("-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}")
    assert [row["layer"] for row in summary.to_dict()["rows"]] == [r.layer for r in summary.rows]
    json.dumps(summary.to_dict(), allow_nan=False)


def test_the_kernels_of_a_runtime_and_why_one_is_in_float():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    config = replace(divqat.preset("x86"), skip=("2",))
    model = divqat.prepare(net, config, randn(8, 3, 8, 8))
    model(randn(8, 3, 8, 8))
    table = divqat.summary(model.eval(), randn(8, 3, 8, 8), runtime="onnxruntime")
    kernels = {row.layer: (row.kernel, row.reason) for row in table.rows if row.kind == "weight"}
    assert kernels["0"] == ("QLinearConv", "") and kernels["4"] == ("QGemm", "")
    assert not kernels["2"][0].startswith("Q") and "weight" in kernels["2"][1]
    assert "QGemm" in str(table) and "in float" in str(table)
    assert "runs as" not in str(divqat.summary(model))
    with pytest.raises(ValueError, match="runtime"):
        divqat.summary(model, randn(8, 3, 8, 8), runtime="tensorflow")
    with pytest.raises(ValueError, match="example_input: wanted a batch"):
        divqat.summary(model, runtime="onnxruntime")
