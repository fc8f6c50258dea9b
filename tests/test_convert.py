"""convert: integers that compute what the prepared model computes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from networks import HAND_WRITTEN, build, conv, images, settle
from testing import randn
from torch import nn

import divqat
from divqat import models
from divqat.nn import FakeQuantize
from divqat.nn.spec import WEIGHT
from divqat.quantize.deployed import IntegerLayer, QuantizeDequantize

pytestmark = pytest.mark.usefixtures("one_thread")


def learned(bits=8):
    config = divqat.preset("x86", weight_bits=bits, activation_bits=bits)
    return replace(
        config,
        weight=replace(config.weight, learned=True),
        activation=replace(config.activation, learned=True),
    )


def prepare(model, config="x86", x=None):
    return divqat.prepare(model, config, images() if x is None else x)


CONFIGS = {
    "x86": divqat.preset("x86"),
    "tensorrt": divqat.preset("tensorrt"),
    "qnnpack": divqat.preset("qnnpack"),
    "4 bits": divqat.preset("x86", weight_bits=4, activation_bits=4),
    "learned": learned(),
}


def assert_close(converted, prepared, x):
    """Equal to the last bits of float32: weights, activations and biases are on the same grids."""
    with torch.no_grad():
        expected = prepared.eval()(x)
        torch.testing.assert_close(converted(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*models.names(), *HAND_WRITTEN])
def test_computes_what_the_prepared_model_computes(name):
    prepared = settle(prepare(build(name)), 10)
    before = copy.deepcopy(prepared.state_dict())
    converted = divqat.convert(prepared)
    assert prepared.training and not converted.training
    assert not any(p.requires_grad for p in converted.parameters())
    for key, value in prepared.state_dict().items():
        assert torch.equal(value, before[key]) if torch.is_tensor(value) else value == before[key]
    assert_close(converted, prepared, images(128, seed=9))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations(config):
    prepared = settle(prepare(build("concat_hardswish"), config), 10)
    converted = divqat.convert(prepared)
    assert_close(converted, prepared, images(128, seed=9))
    integers = [m for m in converted.modules() if isinstance(m, IntegerLayer)]
    assert len(integers) == 5
    for layer in integers:
        spread = 2 ** max(0, 7 - layer.layer.weight_spec.bits)
        limit = spread * layer.layer.weight_spec.quant_max
        assert not (layer.weight % spread).any()
        symmetric = config == divqat.preset("tensorrt")  # it wants float biases
        assert layer.weight.dtype == torch.int8
        assert layer.bias.dtype == (torch.float32 if symmetric else torch.int32)
        assert layer.weight.abs().max() <= limit
        if layer.layer.weight_spec.per_channel and not layer.layer.weight_spec.learned:
            assert (layer.weight.flatten(1).abs().amax(1) == limit).all()  # the grid is used up


@pytest.mark.parametrize("bits", range(2, 9))
def test_few_bits_have_the_same_weights_and_biases_as_fine_as_seven(bits):
    layer = divqat.nn.QuantLinear(6, 3, weight_spec=replace(WEIGHT, bits=bits))
    model = nn.Sequential(layer).train()
    model(randn(50, 6))
    weight = layer.quantize_weight(layer.weight)
    scale = layer.weight.detach().abs().amax(1) / (2 ** (bits - 1) - 1)
    integer = divqat.convert(model.eval())[0]
    assert torch.equal(integer.weight.float() * integer.weight_scale[:, None], weight)
    torch.testing.assert_close(integer.weight_scale, scale / 2 ** max(0, 7 - bits))
    assert (integer.weight.abs() <= (127 if bits == 8 else 64)).all()
    wrong = (integer.bias * integer.bias_scale - layer.bias).abs()
    assert (wrong <= 0.501 * integer.input.scale * integer.weight_scale).all()


def test_integers_worked_by_hand():
    prepared = settle(prepare(build("residual")), 10)
    layer, bn = prepared.conv1, prepared.conv1.bn
    with torch.no_grad():
        s = (bn.weight / (bn.running_var + bn.eps).sqrt()).double()
        folded = layer.weight.double() * s.view(-1, 1, 1, 1)
        scale = folded.abs().amax((1, 2, 3)) / WEIGHT.quant_max
        bias = bn.bias + (layer.bias - bn.running_mean) * s
        codes = (folded / scale.view(-1, 1, 1, 1)).round()
        (input_scale,) = (
            m.scale.double() for n, m in prepared.named_modules() if n == "fake_quantize.x"
        )
    integer = divqat.convert(prepared).conv1
    assert (integer.weight - codes).abs().max() <= 1  # float32 against float64 at a half
    assert ((integer.weight - codes) != 0).double().mean() < 0.01
    torch.testing.assert_close(integer.weight_scale.double(), scale, rtol=1e-5, atol=0)
    assert (integer.bias - bias / (input_scale * scale)).abs().max() < 0.6
    assert isinstance(divqat.convert(prepared).fake_quantize.x, QuantizeDequantize)


@pytest.mark.parametrize("config", ["x86", "qnnpack", learned()], ids=["x86", "qnnpack", "learned"])
@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_channel_switched_off_by_gamma(config, beta):
    model = nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 0.0, beta
    prepared = settle(prepare(model, config), 5)
    converted = divqat.convert(prepared)
    layer = converted.get_submodule("0")
    assert layer.weight_scale.min() > 0 and layer.bias_scale.min() > 0
    assert layer.bias.abs().max() <= 2**30 + 1  # int32 holds it
    assert_close(converted, prepared, images(16))


@pytest.mark.parametrize("config", ["x86", "qnnpack"])
def test_grouped_transposed_convolution(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), conv(6, 2))
    nn.init.normal_(model[0].bias)
    x = images(8).mean(1, keepdim=True).repeat(1, 4, 1, 1) * torch.tensor([1.0, 2, 3, 4]).view(
        -1, 1, 1
    )
    prepared = prepare(model, config, x)
    prepared(x)
    converted = divqat.convert(prepared)
    bias, scale = converted.get_submodule("0").bias, converted.get_submodule("0").bias_scale
    assert bias.dtype == torch.int32
    torch.testing.assert_close(
        bias * scale, model[0].bias.detach(), rtol=0, atol=float(scale.max())
    )
    torch.testing.assert_close(converted(x), prepared.eval()(x).detach(), rtol=0, atol=5e-3)


def test_a_prepared_model_inside_another_keeps_integer_biases():
    wrapped = nn.Sequential(nn.Identity(), prepare(build("residual")))
    converted = divqat.convert(settle(wrapped, 2))
    assert {m.bias.dtype for m in converted.modules() if isinstance(m, IntegerLayer)} == {
        torch.int32
    }


def test_uncalibrated_models_are_refused():
    prepared = prepare(build("residual"))
    with pytest.raises(ValueError, match=r"prepared: fake_quantize\.\w+ has not seen a batch"):
        divqat.convert(prepared)
    prepared.eval()(images())
    with pytest.raises(ValueError, match="has not seen a batch in training mode"):
        divqat.convert(prepared)
    bad = prepare(build("residual"))
    bad.train()(torch.full((8, 3, 12, 12), math.nan))  # its range is still empty
    with pytest.raises(ValueError, match="has not seen a batch in training mode"):
        divqat.convert(bad)
    with pytest.raises(ValueError, match="has not seen a batch in training mode"):
        divqat.convert(prepare(build("residual"), learned()))
    prepared.train()(images())
    divqat.convert(prepared)


def test_quantizer_switched_off_is_not_forgotten():
    """What is deployed is quantized, whatever a training loop switched off for a while."""
    prepared = settle(prepare(build("residual")), 3)
    expected = divqat.convert(prepared)(images())
    for module in prepared.modules():
        if isinstance(module, FakeQuantize):
            module.fake_quant_enabled = False
    assert torch.equal(divqat.convert(prepared)(images()), expected)
