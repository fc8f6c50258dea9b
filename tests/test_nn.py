"""Quantized layers: drop-in for PyTorch's, values from PyTorch's own fake-quantization."""

import pytest
import torch
from testing import randn, tensor
from torch import nn
from torch.nn import functional as F

from divqat.nn import (
    FakeQuantize,
    LearnedStepFakeQuantize,
    QuantConv2d,
    QuantConvBn2d,
    QuantConvTranspose2d,
    QuantLinear,
    QuantSpec,
)
from divqat.nn.spec import ACTIVATION, WEIGHT

# Quantized class, replaced class, constructor arguments, shape of an input.
LAYERS = {
    "conv": (QuantConv2d, nn.Conv2d, (3, 4, 3), {}, (2, 3, 8, 8)),
    "conv, positional": (QuantConv2d, nn.Conv2d, (4, 6, 3, 2, 1, 2, 2, False), {}, (2, 4, 9, 9)),
    "depthwise": (QuantConv2d, nn.Conv2d, (4, 4, 3), {"groups": 4, "stride": (2, 1)}, (2, 4, 8, 8)),
    "same": (QuantConv2d, nn.Conv2d, (3, 4, 3), {"padding": "same", "dilation": 2}, (2, 3, 8, 8)),
    "reflect": (
        *(QuantConv2d, nn.Conv2d, (3, 4, (3, 1))),
        *({"padding": (1, 0), "padding_mode": "reflect", "bias": False}, (2, 3, 8, 8)),
    ),
    "circular": (
        *(QuantConv2d, nn.Conv2d, (3, 4, 3)),
        *({"padding": 1, "padding_mode": "circular"}, (2, 3, 8, 8)),
    ),
    "float64": (QuantConv2d, nn.Conv2d, (3, 4, 3), {"dtype": torch.float64}, (2, 3, 8, 8)),
    "no batch": (QuantConv2d, nn.Conv2d, (3, 4, 3), {}, (3, 8, 8)),
    "transpose": (QuantConvTranspose2d, nn.ConvTranspose2d, (4, 6, 3), {}, (2, 4, 5, 5)),
    "transpose, positional": (
        *(QuantConvTranspose2d, nn.ConvTranspose2d, (4, 6, 3, 2, 1, 1, 2, False, 2)),
        *({}, (2, 4, 5, 5)),
    ),
    "linear": (QuantLinear, nn.Linear, (5, 3), {}, (2, 7, 5)),
    "linear, no bias": (QuantLinear, nn.Linear, (5, 3, False), {}, (4, 5)),
    "linear, keywords": (
        *(QuantLinear, nn.Linear, ()),
        *({"in_features": 5, "out_features": 3, "dtype": torch.float64}, (4, 5)),
    ),
}
each_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def aten_weight(weight, axis, quant_min=WEIGHT.quant_min, quant_max=WEIGHT.quant_max):
    """The weight on its grid by torch's op, with the scale worked out here."""
    if axis is None:
        scale = weight.abs().max().float() * 2 / (quant_max - quant_min)
        return torch.fake_quantize_per_tensor_affine(
            weight, scale, torch.zeros((), dtype=torch.int32), quant_min, quant_max
        )
    dims = [dim for dim in range(weight.dim()) if dim != axis]
    scale = weight.abs().amax(dims).float() * 2 / (quant_max - quant_min)
    zero = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, quant_min, quant_max)


def aten_input(x):
    """A first batch on the uint8 affine grid by torch's op."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (torch.tensor(high) - torch.tensor(low)) / 255
    zero_point = int((-torch.tensor(low) / scale).round())
    return torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, 0, 255)


@each_layer
def test_is_a_drop_in_with_the_values_of_torch(case):
    quantized, replaced, args, kwargs, shape = case
    layer, plain = quantized(*args, **kwargs), replaced(*args, **kwargs)
    assert isinstance(layer, replaced)
    plain.load_state_dict(
        {"weight": layer.weight, **({"bias": layer.bias} if layer.bias is not None else {})}
    )
    axis = 1 if replaced is nn.ConvTranspose2d else 0
    with torch.no_grad():
        plain.weight.copy_(aten_weight(layer.weight, axis))
        x = randn(*shape, dtype=layer.weight.dtype, seed=3)
        torch.testing.assert_close(layer(x), plain(aten_input(x)), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(layer(x), plain(x), rtol=1e-5, atol=1e-6)  # it does quantize


@each_layer
def test_gradients_are_straight_through(case):
    quantized, _, args, kwargs, shape = case
    layer = quantized(*args, **kwargs)
    x = randn(*shape, dtype=layer.weight.dtype, seed=3).requires_grad_()
    cotangent = torch.randn_like(layer(x))
    (layer(x) * cotangent).sum().backward()

    # The operation itself, at the quantized values: no element of either is out of range here.
    w = aten_weight(layer.weight.detach(), layer.WEIGHT_AXIS).requires_grad_()
    q = aten_input(x.detach()).requires_grad_()
    (layer.compute(q, w, layer.bias) * cotangent).sum().backward()
    torch.testing.assert_close(x.grad, q.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_grid_of_any_width(bits, per_channel):
    spec = QuantSpec(bits=bits, per_channel=per_channel)
    layer = QuantConv2d(3, 4, 3, weight_spec=spec, input_spec=None, bias=False)
    x = randn(1, 3, 5, 5)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    axis = 0 if per_channel else None
    weight = aten_weight(layer.weight.detach(), axis, low, high)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight), rtol=1e-5, atol=1e-6)
    codes = layer.quantize_weight(layer.weight) / layer.weight_qparams().view(-1, 1, 1, 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().min() >= low and codes.round().max() <= high


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_weights_and_inputs_are_exact(value):
    layer = QuantLinear(4, 2)
    nn.init.constant_(layer.weight, value)
    x = torch.full((3, 4), value)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("size", [(9, 9), (10, 9), (2, 6, 10, 10)])
def test_a_transposed_convolution_takes_its_output_size(size):
    layer, plain = QuantConvTranspose2d(4, 6, 3, 2, 1), nn.ConvTranspose2d(4, 6, 3, 2, 1)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = randn(2, 4, 5, 5)
    with torch.no_grad():
        plain.weight.copy_(aten_weight(layer.weight, 1))
        expected = plain(aten_input(x), output_size=size)
        torch.testing.assert_close(layer(x, output_size=size), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape[2:] == size[-2:]
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=(11, 11))


def test_empty_batch():
    layer = QuantConv2d(3, 4, 3)
    assert layer(torch.empty(0, 3, 8, 8)).shape == (0, 4, 6, 6)
    assert not layer.input_fake_quantize.calibrated  # it has seen nothing


@each_layer
def test_float_checkpoint_loads_strictly_and_unchanged(case):
    quantized, replaced, args, kwargs, _ = case
    state = replaced(*args, **kwargs).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    layer = quantized(*args, **kwargs)
    layer.load_state_dict(state, strict=True)
    assert state.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)
    with pytest.raises(RuntimeError, match="weight"):  # a real gap is still an error
        layer.load_state_dict({key: value for key, value in state.items() if key != "weight"})


def learned_conv():
    learned = QuantSpec(learned=True, per_channel=True)
    inputs = QuantSpec(signed=False, symmetric=False, learned=True)
    return QuantConv2d(3, 4, 3, weight_spec=learned, input_spec=inputs)


@pytest.mark.parametrize(
    "make",
    [lambda: QuantConv2d(3, 4, 3), lambda: QuantConvBn2d(3, 4, 3), learned_conv],
    ids=["conv", "conv_bn", "learned"],
)
def test_quantized_checkpoint_round_trips(make, tmp_path):
    layer, x = make(), randn(2, 3, 8, 8)
    layer(x)
    if isinstance(layer, QuantConvBn2d):
        layer.freeze()
    layer.input_fake_quantize.fake_quant_enabled = False
    torch.save(layer.state_dict(), tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)  # no pickled class
    torch.manual_seed(1)
    other = make()
    other.load_state_dict(state, strict=True)
    assert not other.input_fake_quantize.fake_quant_enabled
    assert getattr(other, "frozen", None) == getattr(layer, "frozen", None)
    assert torch.equal(other(2 * x), layer(2 * x))
    for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    other.input_fake_quantize.fake_quant_enabled = True
    assert not torch.equal(other.eval()(x), layer.eval()(x))


def test_checkpoint_without_a_buffer_or_of_another_version_is_refused():
    state = FakeQuantize().state_dict()
    with pytest.raises(RuntimeError, match="running_max"):
        FakeQuantize().load_state_dict({k: v for k, v in state.items() if k != "running_max"})
    for other in (state["_extra_state"] + 7, {"version": 9}):
        with pytest.raises(ValueError, match="wanted extra state of version 2, got 9"):
            FakeQuantize().load_state_dict(state | {"_extra_state": other})


def test_checkpoint_of_version_1_loads():
    # As of an observed quantizer that saw a batch, and of a learned one that saw none.
    quantizer, x = FakeQuantize(), randn(32)
    quantizer(x)
    switches = {"observer_enabled": True, "fake_quant_enabled": True, "calibrated": True}
    other = FakeQuantize()
    other.load_state_dict(quantizer.state_dict() | {"_extra_state": {"version": 1} | switches})
    assert torch.equal(other.eval()(2 * x), quantizer.eval()(2 * x))

    switches = {"version": 1, "fake_quant_enabled": True, "initialized": False}
    learned = LearnedStepFakeQuantize()
    learned.load_state_dict(
        {"scale": tensor(1.0), "zero_point": tensor(0.0), "_extra_state": switches}
    )
    assert torch.equal(learned.eval()(x), x) and not learned.has_range()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantSpec(bits=1), "bits: wanted 2 to 8, got 1"),
        (lambda: QuantSpec(bits=9), "bits: wanted 2 to 8, got 9"),
        (lambda: QuantSpec(averaging_constant=0), "averaging_constant"),
        (lambda: QuantLinear(2, 2, weight_spec=QuantSpec(signed=False)), "weight_spec: wanted a s"),
        (lambda: QuantLinear(2, 2, weight_spec=QuantSpec(symmetric=False)), "weight_spec"),
        (lambda: FakeQuantize(ch_axis=1), "ch_axis, num_channels"),
        (lambda: QuantConvBn2d(2, 2, 1, weight_spec=QuantSpec(learned=True)), "per channel"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_in_eval_mode_a_bias_is_what_an_integer_kernel_adds():
    """A whole number where input and weight have scale 1; on TensorRT's grid it stays as it is."""
    for spec, deployed in ((ACTIVATION, 3.0), (QuantSpec(), 2.6)):
        layer = QuantLinear(2, 1, input_spec=spec)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[63.0, 0.0]]))
            layer.bias.fill_(2.6)
        x = torch.tensor([[0.0, 0.0], [0.0, 254.0 if spec.symmetric else 255.0]])
        float_bias = torch.full((2, 1), 2.6)
        assert torch.equal(layer(x), float_bias)
        layer.eval()(x).sum().backward()
        assert torch.equal(layer(x), torch.full((2, 1), deployed)) and layer.bias.grad == 2
        layer.input_fake_quantize.fake_quant_enabled = False
        assert torch.equal(layer(x), float_bias)
