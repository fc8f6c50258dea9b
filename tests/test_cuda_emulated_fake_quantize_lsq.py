"""The CUDA kernels of fake_quantize_lsq, run by the emulator on CPU tensors."""

import math

import pytest
import torch
from backends import launches
from cuda_emulator.build import why_not
from testing import DTYPES, bits, randn, tensor

from divqat.ops.reference import fake_quantize_lsq_backward_ref, fake_quantize_lsq_ref

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module", autouse=True)
def emulator(emulated_kernels):
    return emulated_kernels


def lsq_inputs(shape, ch_axis, dtype, seed=0):
    x = randn(*shape, dtype=dtype, seed=seed).mul_(3)
    n = 1 if ch_axis is None else shape[ch_axis]
    scale = torch.linspace(0.11, 0.35, n)
    zero_point = torch.linspace(-2.6, 3.4, n)
    if ch_axis is None:
        scale, zero_point = scale[0], zero_point[0]
    return randn(*shape, dtype=dtype, seed=seed + 1), x, scale, zero_point


def check_lsq(grad_y, x, scale, zero_point, ch_axis):
    args = (x, scale, zero_point, -8, 7, ch_axis)
    y = torch.ops.divqat.fake_quantize_lsq(*args)
    wanted = fake_quantize_lsq_ref(*args)
    assert y.stride() == torch.empty_like(x).stride()
    assert torch.equal(bits(y), bits(wanted))
    grads = torch.ops.divqat.fake_quantize_lsq_backward(grad_y, *args, 0.25)
    plain = fake_quantize_lsq_backward_ref(grad_y, *args, 0.25)
    assert grads[0].stride() == torch.empty_like(x).stride()
    assert torch.equal(grads[0], plain[0])
    # the sums, against float64 over the same float32 values of x / scale
    for grad, wanted in zip(grads[1:], lsq_sums(grad_y, *args, 0.25), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), wanted.view_as(grad), rtol=1e-5, atol=1e-5)
    again = torch.ops.divqat.fake_quantize_lsq_backward(grad_y, *args, 0.25)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(grads, again, strict=True))


def lsq_sums(grad_y, x, scale, zero_point, quant_min, quant_max, ch_axis, grad_factor):
    """Gradients of scale and zero point with the sums in float64."""
    shape = [1] * x.dim()
    if ch_axis is not None:
        shape[ch_axis] = -1
    s = scale.view(shape)
    z = zero_point.round().clamp(quant_min, quant_max).view(shape)
    u = x * s.reciprocal() if x.dtype == torch.float64 else x.float() * s.reciprocal()
    rounded = u.round() + z
    q = rounded.clamp(quant_min, quant_max)
    inside = rounded == q
    grad = grad_y.double()
    dims = [d for d in range(x.dim()) if d != ch_axis]
    by_scale = grad * (q - z - torch.where(inside, u, 0.0)).double() * grad_factor
    by_zero = torch.where(inside, 0.0, -grad) * s.double() * grad_factor
    return tuple(v.sum(dims) if dims else v for v in (by_scale, by_zero))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 8, 31, 257, 4096, 70001])
def test_lsq_per_tensor(dtype, n):
    check_lsq(*lsq_inputs((n,), None, dtype), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "ch_axis"),
    [
        ((2, 3, 5), 1),  # runs that no pack fits
        ((2, 3, 16), 1),  # runs of whole packs
        ((700, 2, 24), 1),  # several parts of a channel, several rounds
        ((40, 9), 0),  # one run per channel
        ((1, 4, 8), 0),  # one channel
        ((5, 7), 1),  # columns that no pack fits
        ((513, 16), 1),  # columns of whole packs, several parts
        ((3000, 2), 1),
        ((9, 400), 1),  # several tiles of columns
        ((2, 20000), 1),  # more channels than the last block is given sums
        ((300,), 0),  # one element per channel
    ],
)
def test_lsq_per_channel(dtype, shape, ch_axis):
    check_lsq(*lsq_inputs(shape, ch_axis, dtype), ch_axis)


@pytest.mark.parametrize("ch_axis", [None, 0, 1, 2, 3, -1])
def test_lsq_layouts(ch_axis):
    grad_y, x, scale, zero_point = lsq_inputs((4, 6, 3, 5), ch_axis, torch.float32)
    for like in (
        x.to(memory_format=torch.channels_last),
        x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        torch.stack([x, x], -1)[..., 0],
    ):
        axis = None if ch_axis is None else ch_axis % 4
        check_lsq(grad_y, like, scale, zero_point, axis)
        check_lsq(grad_y.to(memory_format=torch.channels_last), like, scale, zero_point, axis)


@pytest.mark.parametrize("ch_axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lsq_off_16_byte_boundaries(ch_axis, dtype):
    grad_y, x, scale, zero_point = lsq_inputs((16, 8), ch_axis, dtype)
    shifted = torch.empty(129, dtype=dtype)[1:].view(16, 8).copy_(x)
    check_lsq(grad_y, shifted, scale, zero_point, ch_axis)


def test_lsq_special_values():
    x = tensor([math.nan, math.inf, -math.inf, 1e30, -0.0, 0.125, 0.375, -0.125, 3.9])
    for y in (
        torch.ops.divqat.fake_quantize_lsq(x, tensor(0.25), tensor(0.5), -8, 7, None),
        torch.ops.divqat.fake_quantize_lsq(
            x.view(3, 3).t().contiguous().t(),
            torch.full((3,), 0.25),
            torch.full((3,), 0.5),
            -8,
            7,
            0,
        ),
    ):
        wanted = fake_quantize_lsq_ref(x, tensor(0.25), tensor(0.5), -8, 7, None)
        assert torch.equal(bits(y.flatten()), bits(wanted))
    args = (torch.ones(9), x, tensor(0.25), tensor(0.5), -8, 7, None, 1.0)
    grads = torch.ops.divqat.fake_quantize_lsq_backward(*args)
    wanted = fake_quantize_lsq_backward_ref(*args)
    assert torch.equal(grads[0], wanted[0])
    assert grads[1].isnan() and wanted[1].isnan()
    assert torch.equal(grads[2], wanted[2])


@pytest.mark.parametrize("ch_axis", [None, 0, 1])
def test_lsq_whole_zero_point_has_gradient_zero(ch_axis):
    grad_y, x, scale, zero_point = lsq_inputs((64, 48), ch_axis, torch.float32)
    whole = zero_point.round().int()
    args = (x, scale, whole, -8, 7, ch_axis)
    wanted = torch.ops.divqat.fake_quantize_lsq(x, scale, whole.float(), -8, 7, ch_axis)
    assert torch.equal(torch.ops.divqat.fake_quantize_lsq(*args), wanted)
    grads = torch.ops.divqat.fake_quantize_lsq_backward(grad_y, *args, 1.0)
    assert grads[2].dtype == torch.float32 and not grads[2].any()
    wanted = fake_quantize_lsq_backward_ref(grad_y, *args, 1.0)
    torch.testing.assert_close(grads[1], wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ch_axis", "shape"), [(None, (5000,)), (0, (30, 40)), (1, (900, 12))])
def test_lsq_launches(emulator, ch_axis, shape):
    grad_y, *args = lsq_inputs(shape, ch_axis, torch.float32)
    args += [-8, 7, ch_axis]
    _, count = launches(emulator, lambda: torch.ops.divqat.fake_quantize_lsq(*args))
    assert count == 1
    backward = torch.ops.divqat.fake_quantize_lsq_backward
    _, count = launches(emulator, lambda: backward(grad_y, *args, 1.0))
    assert count == 1


def test_captured_launches_give_the_same(emulator):
    """A launch in a graph has a counter of its own."""
    grad_y, *args = lsq_inputs((5000,), None, torch.float32)
    args += [-8, 7, None]
    backward = torch.ops.divqat.fake_quantize_lsq_backward
    eager = backward(grad_y, *args, 1.0)
    emulator.set_capturing(True)
    try:
        captured = backward(grad_y, *args, 1.0)
    finally:
        emulator.set_capturing(False)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(eager, captured, strict=True))


def test_lsq_empty_launches_nothing(emulator):
    x = torch.zeros(0, 3)
    args = (x, torch.ones(3), torch.zeros(3), -8, 7, 1)
    y, count = launches(emulator, lambda: torch.ops.divqat.fake_quantize_lsq(*args))
    assert y.shape == (0, 3) and count == 0
    backward = torch.ops.divqat.fake_quantize_lsq_backward
    grads, count = launches(emulator, lambda: backward(x, *args, 1.0))
    assert count == 0 and not grads[1].any() and not grads[2].any()
