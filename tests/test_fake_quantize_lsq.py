"""fake_quantize_lsq against float64 autograd through the straight-through formula."""

import pytest
import torch
from testing import DTYPES, randn, same, tensor

from divqat.ops import fake_quantize, fake_quantize_lsq

pytestmark = pytest.mark.usefixtures("backend")


def oracle(x, scale, zero_point, quant_min, quant_max, ch_axis=None):
    """LSQ as autograd sees it: rounding is the identity, clamping is clamping, in float64."""
    shape = [1] * x.dim()
    if ch_axis is not None:
        shape[ch_axis] = -1
    scale, zero_point = scale.double().view(shape), zero_point.double().view(shape)

    def round_ste(value):
        return value + (value.round() - value).detach()

    z = round_ste(zero_point)
    # clamp the rounded code, with its gradient masked on the rounded value
    q = round_ste(x.double() / scale) + z
    inside = (q >= quant_min) & (q <= quant_max)
    low = torch.full_like(q, quant_min).where(q < quant_min, torch.full_like(q, quant_max))
    return (torch.where(inside, q, low) - z) * scale


@pytest.mark.parametrize("ch_axis", [None, 0, 1, -1])
@pytest.mark.parametrize("grad_factor", [1.0, 0.05])
def test_value_and_gradients(ch_axis, grad_factor):
    x = randn(6, 5, 4).mul_(3).requires_grad_()
    n = 1 if ch_axis is None else x.shape[ch_axis]
    scale = torch.linspace(0.11, 0.2, n).requires_grad_()
    zero_point = torch.linspace(-1.4, 2.3, n).requires_grad_()
    args = (x, scale, zero_point)
    y = fake_quantize_lsq(*args, -8, 7, ch_axis, grad_factor=grad_factor)
    wanted = oracle(*args, -8, 7, ch_axis)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)
    cotangent = randn(6, 5, 4, seed=1)
    grads = torch.autograd.grad(y, args, cotangent)
    wanted = torch.autograd.grad(wanted, args, cotangent.double())
    torch.testing.assert_close(grads[0], wanted[0])
    for grad, reference in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(grad, reference * grad_factor, rtol=2e-4, atol=2e-4)


def test_gradients_by_hand():
    # s = 0.5, z = 0, codes in [-2, 1]; x/s = -6, -1.2, 0.6, 4
    x = tensor([-3.0, -0.6, 0.3, 2.0]).requires_grad_()
    scale, zero_point = tensor(0.5).requires_grad_(), tensor(0.0).requires_grad_()
    y = fake_quantize_lsq(x, scale, zero_point, -2, 1)
    y.sum().backward()
    assert y.tolist() == [-1.0, -0.5, 0.5, 0.5]
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    # -2, (-1 + 1.2), (1 - 0.6), 1
    assert scale.grad.item() == pytest.approx(-2 + 0.2 + 0.4 + 1)
    assert zero_point.grad.item() == pytest.approx(-0.5 * 2)


@pytest.mark.parametrize("zero_point", [-1.4, 0.5, 1.5, -0.5, -9.0])
def test_zero_point_is_rounded_alike_forward_and_backward(zero_point):
    """PyTorch's own op rounds it to another integer in its backward: wrong masks."""
    x = torch.linspace(-6, 6, 49).requires_grad_()
    scale, z = tensor(0.5), tensor(zero_point)
    y = fake_quantize_lsq(x, scale, z, -8, 7)
    (grad,) = torch.autograd.grad(y.sum(), x)
    fixed = torch.tensor(max(-8, round(zero_point)), dtype=torch.int32)
    plain = x.detach().requires_grad_()
    wanted = fake_quantize(plain, scale, fixed, -8, 7)
    assert torch.equal(y, wanted)
    assert torch.equal(grad, torch.autograd.grad(wanted.sum(), plain)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    x = randn(64, dtype=dtype).requires_grad_()
    scale = tensor(0.05).requires_grad_()
    zero_point = torch.tensor(3, dtype=torch.int32)
    y = fake_quantize_lsq(x, scale, zero_point, -128, 127)
    wanted = torch.fake_quantize_per_tensor_affine(
        x.detach(), scale.detach(), zero_point, -128, 127
    )
    assert y.dtype == dtype and torch.equal(y, wanted)
    y.sum().backward()
    assert x.grad.dtype == dtype and scale.grad.dtype == torch.float32


def test_channels_last_and_strided():
    x = randn(2, 3, 4, 5)
    scale, zero_point = tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    plain = fake_quantize_lsq(x, scale, zero_point, -8, 7, 1)
    for view in (x.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0]):
        leaf = view.detach().requires_grad_()
        y = fake_quantize_lsq(leaf, scale, zero_point, -8, 7, 1)
        assert torch.equal(y, plain)
        y.sum().backward()
        assert leaf.grad.shape == x.shape


def test_double_backward_differentiates_the_formula():
    x = randn(30, dtype=torch.float64).mul_(3).requires_grad_()
    scale = tensor(0.3).requires_grad_()
    v = randn(30, dtype=torch.float64, seed=1).requires_grad_()
    y = fake_quantize_lsq(x, scale, torch.zeros(()), -4, 3)
    grad_x, grad_scale = torch.autograd.grad(y, (x, scale), v, create_graph=True)
    # grad_scale = Σ v (q − x/s inside): its derivative by v is that bracket, by x it is −v/s inside
    by_v, by_x = torch.autograd.grad(grad_scale, (v, x), retain_graph=True)
    s = scale.detach().double()
    q = (x / s).round()
    inside = (q >= -4) & (q <= 3)
    bracket = q.clamp(-4, 3) - torch.where(inside, x / s, 0.0)
    torch.testing.assert_close(by_v, bracket.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        by_x, torch.where(inside, -v / s, 0.0).detach(), rtol=1e-6, atol=1e-6
    )
    (twice,) = torch.autograd.grad(grad_x.square().sum(), v)
    torch.testing.assert_close(twice, (2 * v * inside).detach())


EPS = 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ch_axis", [None, 0, 1])
@pytest.mark.parametrize("bad", [0.0, -3.0, -float("inf"), EPS / 2])
def test_from_epsilon_down_the_scale_is_epsilon_and_its_gradient_raises_it(bad, ch_axis, dtype):
    # half of the values within the codes of the smallest scale, the others far outside
    x = torch.cat([randn(3, 4).mul_(4 * EPS), randn(3, 4, seed=1)], 1).to(dtype)
    n = () if ch_axis is None else (x.shape[ch_axis],)
    cotangent = randn(3, 8, dtype=dtype, seed=2)
    found = []
    for value in (bad, EPS):
        args = [t.requires_grad_() for t in (x.clone(), torch.full(n, value), torch.full(n, 0.4))]
        y = fake_quantize_lsq(*args, -8, 7, ch_axis, grad_factor=0.3)
        found.append([y.detach(), *torch.autograd.grad(y, args, cotangent)])
    same(*found)
    wide = [t.double().detach().requires_grad_() for t in args]
    wanted = oracle(*wide, -8, 7, ch_axis)
    if dtype == torch.float32:  # a rounded value is another one in float64
        torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(wanted, wide, cotangent.double())
    by_x, by_scale, by_zero_point = found[0][1:]
    torch.testing.assert_close(by_scale.double(), -0.3 * grads[1].abs(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(by_zero_point.double(), 0.3 * grads[2], rtol=1e-3, atol=1e-9)
    assert (by_scale < 0).all() and 0 < (by_x == 0).sum() < x.numel()


def test_scales_of_other_channels_are_left_alone():
    x, cotangent = randn(4, 50).mul_(3), randn(4, 50, seed=1)
    scale = tensor([0.3, -1.0, 0.3, 2 * EPS])
    found = []
    for values in (scale, scale.abs().clamp(min=2 * EPS)):
        args = [t.clone().requires_grad_() for t in (x, values, torch.zeros(4))]
        y = fake_quantize_lsq(*args, -8, 7, 0)
        found.append([y, *torch.autograd.grad(y, args, cotangent)])
    same(*([v.detach()[[0, 2, 3]] for v in part] for part in found))


def test_a_scale_of_nan_is_not_hidden():
    scale = tensor(float("nan")).requires_grad_()
    y = fake_quantize_lsq(randn(5), scale, torch.zeros(()), -8, 7)
    y.sum().backward()
    assert y.isnan().all() and scale.grad.isnan()


def test_double_backward_below_epsilon():
    x, v = randn(30, dtype=torch.float64), randn(30, dtype=torch.float64, seed=1).requires_grad_()
    scale = tensor(-0.2).requires_grad_()
    y = fake_quantize_lsq(x, scale, torch.zeros(()), -4, 3)
    (grad,) = torch.autograd.grad(y, scale, v, create_graph=True)
    # −|Σ v q|, all codes at an end
    codes = torch.where(x > 0, 3.0, -4.0).double()
    total = (v.detach() * codes).sum()
    torch.testing.assert_close(grad.double(), -total.abs())
    torch.testing.assert_close(torch.autograd.grad(grad, v)[0], -total.sign() * codes)


def test_empty():
    x = torch.zeros(0, 3, requires_grad=True)
    scale = tensor(0.1).requires_grad_()
    fake_quantize_lsq(x, scale, torch.zeros(()), -8, 7).sum().backward()
    assert x.grad.shape == (0, 3) and scale.grad.item() == 0.0


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"zero_point: wanted torch.float32 or torch.int32"):
        fake_quantize_lsq(torch.zeros(3), tensor(1.0), torch.zeros((), dtype=torch.int64), -8, 7)
    with pytest.raises(ValueError, match=r"scale: wanted shape \[\] for one tensor, got \[2\]"):
        fake_quantize_lsq(torch.zeros(3), torch.ones(2), torch.zeros(()), -8, 7)
