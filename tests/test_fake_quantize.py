"""fake_quantize against torch's own ops bit for bit, hand-worked tables, and its edges."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from testing import DEVICES, DTYPES, bits, randn, tensor

from divqat.ops import fake_quantize
from divqat.ops._mask import pack_mask, unpack_mask
from divqat.ops._triton import interpreted

pytestmark = pytest.mark.usefixtures("backend")

INT8 = (-128, 127)


def qparams(scale, zero_point, device=None):
    return tensor(scale, device=device), tensor(zero_point, torch.int32, device)


def aten(x, scale, zero_point, quant_min, quant_max, ch_axis=None):
    """ATen's op on the CPU: on CUDA, that with channels rounds other values near a tie."""
    given = x.cpu(), scale.cpu(), zero_point.cpu()
    if ch_axis is None:
        y = torch.fake_quantize_per_tensor_affine(*given, quant_min, quant_max)
    else:
        y = torch.fake_quantize_per_channel_affine(*given, ch_axis, quant_min, quant_max)
    return y.to(x.device)


@st.composite
def cases(draw):
    """An input of any shape, dtype and layout with its quantization parameters."""
    shape = draw(st.lists(st.integers(0, 7), min_size=0, max_size=5))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    magnitude = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    ch_axis = draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    n = 1 if ch_axis is None else shape[ch_axis]
    assume(n > 0)  # ATen refuses an axis of length 0; test_empty_and_scalar has it
    scale = torch.rand(n, generator=generator, device="cpu") + 1e-3
    scale *= draw(st.sampled_from([1e-4, 0.1, 1.0]))
    quant_min, quant_max = draw(
        st.sampled_from([(-128, 127), (0, 255), (-127, 127), (0, 15), (-4, 3)])
    )
    zero_point = torch.randint(
        quant_min, quant_max + 1, (n,), generator=generator, dtype=torch.int32, device="cpu"
    )
    half_grid = torch.round(x * 20) / 2 * scale[:1].double()  # where the rounding rule shows
    x = half_grid if draw(st.booleans()) else x * magnitude
    device = torch.get_default_device()
    x, scale, zero_point = x.to(device, dtype), scale.to(device), zero_point.to(device)
    if ch_axis is None:
        scale, zero_point = scale[0], zero_point[0]
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    if layout == "transposed" and x.dim() >= 2:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided" and x.dim() >= 1:
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    elif layout == "expanded" and x.dim() >= 1 and x.shape[0] and ch_axis is None:
        x = x[:1].expand(x.shape)
    return x, scale, zero_point, quant_min, quant_max, ch_axis


# the interpreter's kernels meet more in test_triton.py
@pytest.mark.slow
@settings(max_examples=60 if interpreted() else 400, deadline=None, derandomize=True)
@given(cases())
def test_equals_torch_bit_for_bit_gradients_included(case):
    x, scale, zero_point, quant_min, quant_max, ch_axis = case
    torch_axis = None if ch_axis is None else ch_axis % x.dim()
    outputs = []
    for function, axis in ((aten, torch_axis), (fake_quantize, ch_axis)):
        leaf = x.detach().requires_grad_()
        y = function(leaf, scale, zero_point, quant_min, quant_max, axis)
        cotangent = randn(*y.shape, dtype=y.dtype, seed=1)
        outputs.append((y, torch.autograd.grad(y, leaf, cotangent)[0]))
    (wanted, wanted_grad), (y, grad) = outputs
    assert y.dtype == x.dtype and y.shape == x.shape
    assert torch.equal(bits(y), bits(wanted))
    assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_half_to_even_and_masks_the_rounded_value(dtype, device):
    # scale 1: the code of each value, and whether it lies in [-4, 3] once rounded
    values = [-4.6, -4.5, -4.4, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.4, 3.5, 3.6]
    wanted = [-4.0, -4.0, -4.0, -2.0, 0.0, 0.0, 0.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    inside = [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    x = tensor(values, dtype, device).requires_grad_()
    y = fake_quantize(x, *qparams(1.0, 0, device), -4, 3)
    y.sum().backward()
    assert y.tolist() == wanted
    assert x.grad.tolist() == inside


def test_zero_point_is_added_after_rounding():
    # x/s = .5, 1.5, 2.5 round to 0, 2, 2; adding an odd zero point first would give -1 … (ties).
    x = tensor([0.5, 1.5, 2.5])
    assert fake_quantize(x, *qparams(1.0, 1), *INT8).tolist() == [0.0, 2.0, 2.0]
    per_channel = fake_quantize(x[None], *qparams([1.0], [1]), *INT8, ch_axis=0)
    assert per_channel.tolist() == [[0.0, 2.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ch_axis", [None, 0])
def test_nan_propagates_and_infinity_saturates(dtype, ch_axis):
    x = tensor([float("nan"), float("inf"), -float("inf"), 0.25], dtype).requires_grad_()
    parameters = qparams(0.5, 0) if ch_axis is None else qparams([0.5] * 4, [0] * 4)
    y = fake_quantize(x, *parameters, -8, 7, ch_axis)
    y.sum().backward()
    assert y[0].isnan() and y[1:].tolist() == [3.5, -4.0, 0.0]
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_nan_like_aten_on_request():
    x = tensor([float("nan"), 1.0]).requires_grad_()
    y = fake_quantize(x, *qparams(0.5, 3), -8, 7, nan="aten")
    y.sum().backward()
    assert torch.equal(y, aten(x, *qparams(0.5, 3), -8, 7))
    assert x.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: x[:, ::2, 1:],
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
    ],
)
@pytest.mark.parametrize("ch_axis", [None, 0, 1, 2, -1])
def test_any_layout(layout, ch_axis):
    x = layout(randn(3, 4, 5, 7)).detach().requires_grad_()
    n = 1 if ch_axis is None else x.shape[ch_axis]
    scale, zero_point = torch.linspace(0.05, 0.2, n), torch.arange(n, dtype=torch.int32)
    if ch_axis is None:
        scale, zero_point = scale[0], zero_point[0]
    y = fake_quantize(x, scale, zero_point, *INT8, ch_axis)
    cotangent = randn(*y.shape, seed=2)  # contiguous, whatever y is
    (grad,) = torch.autograd.grad(y, x, cotangent)
    axis = None if ch_axis is None else ch_axis % 4
    plain = x.detach().contiguous().requires_grad_()
    wanted = aten(plain, scale, zero_point, *INT8, axis)
    assert torch.equal(y, wanted)
    assert torch.equal(grad, torch.autograd.grad(wanted, plain, cotangent)[0])
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_and_scalar(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = fake_quantize(x, *qparams(0.1, 0), *INT8)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_an_axis_without_channels():
    x = torch.zeros(2, 0, 3)
    none = torch.zeros(0)
    assert fake_quantize(x, none, none.int(), *INT8, ch_axis=1).shape == (2, 0, 3)


def test_double_backward_is_the_mask_again():
    x = randn(4, 6).mul_(10).requires_grad_()
    v = randn(4, 6, seed=1).requires_grad_()
    y = fake_quantize(x, *qparams(0.1, 0), -50, 50)
    (grad,) = torch.autograd.grad(y, x, v, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), v)
    inside = (torch.round(x / 0.1).abs() <= 50).float()
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(second, 2 * v * inside)


def test_gradient_is_the_straight_through_estimator():
    x = randn(500).mul_(3).requires_grad_()
    scale, zero_point = qparams(0.03, 5)
    q = torch.round(x / scale) + zero_point
    ste = x + ((q.clamp(*INT8) - zero_point) * scale - x).detach()
    ste = torch.where((q >= -128) & (q <= 127), ste, ste.detach())
    (wanted,) = torch.autograd.grad(ste.sum(), x)
    (grad,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, *INT8).sum(), x)
    assert torch.equal(grad, wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), max_size=70))
def test_mask_packs_low_bit_first(values):
    packed = pack_mask(torch.tensor(values, dtype=torch.bool))
    by_hand = [
        sum(bit << i for i, bit in enumerate(values[start : start + 8]))
        for start in range(0, len(values), 8)
    ]
    assert packed.dtype == torch.uint8 and packed.tolist() == by_hand
    assert unpack_mask(packed, torch.empty(len(values))).tolist() == values


def test_backward_keeps_one_bit_per_element(backend):
    saved = []

    def keep(t):
        saved.append(t)
        return t

    x = randn(1000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fake_quantize(x, *qparams(0.1, 0), *INT8)
    # traceable ones are a compiler's business
    wanted = 1000 if backend == "traceable" else 125
    assert sum(t.numel() * t.element_size() for t in saved) == wanted


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(3, dtype=torch.int32)}, TypeError, "x: wanted float32"),
        ({"x": [1.0]}, TypeError, "x: wanted a Tensor, got list"),
        ({"scale": torch.ones((), dtype=torch.float64)}, TypeError, "scale: wanted torch.float32"),
        ({"scale": torch.ones(2)}, ValueError, "scale: wanted shape"),
        ({"zero_point": torch.zeros(())}, TypeError, "zero_point: wanted torch.int32"),
        ({"quant_min": 127}, ValueError, "wanted quant_min < quant_max, got 127, 127"),
        ({"quant_max": 2**24}, ValueError, "24 bits"),
        ({"ch_axis": 1}, IndexError, "ch_axis: wanted an axis of x with 1 dims, got 1"),
        ({"ch_axis": 0}, ValueError, r"scale: wanted shape \[3\]"),
        ({"nan": "skip"}, ValueError, "nan: wanted one of propagate, aten, got 'skip'"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    scale, zero_point = qparams(0.1, 0)
    arguments = {
        "x": torch.zeros(3),
        "scale": scale,
        "zero_point": zero_point,
        "quant_min": -128,
        "quant_max": 127,
    }
    with pytest.raises(error, match=words):
        fake_quantize(**(arguments | change))
