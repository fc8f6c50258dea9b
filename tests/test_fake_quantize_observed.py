"""fake_quantize_observed: hand-worked ranges, its modes, and what bad batches must not do."""

import pytest
import torch
from testing import DTYPES, randn, tensor

from divqat.ops import fake_quantize, fake_quantize_observed

pytestmark = pytest.mark.usefixtures("backend")

INF = float("inf")


def buffers(n=None):
    shape = [] if n is None else [n]
    return [
        torch.full(shape, INF),
        torch.full(shape, -INF),
        torch.ones(shape),
        torch.zeros(shape, dtype=torch.int32),
    ]


def test_moving_average_and_affine_qparams_by_hand():
    b = buffers()
    # first batch as it is: [-1, 3]; scale 4/255, zero point 0 - round(-1 / (4/255)) = 64
    fake_quantize_observed(tensor([-1.0, 3.0]), *b, 0, 255, averaging_constant=0.5)
    assert (b[0].item(), b[1].item()) == (-1.0, 3.0)
    assert b[2].item() == pytest.approx(4 / 255) and b[3].item() == 64
    # second: -1 + .5 (-5 + 1) = -3, 3 + .5 (1 - 3) = 2; scale 5/255, zero point 153
    fake_quantize_observed(tensor([-5.0, 1.0]), *b, 0, 255, averaging_constant=0.5)
    assert (b[0].item(), b[1].item()) == (-3.0, 2.0)
    assert b[2].item() == pytest.approx(5 / 255) and b[3].item() == 153


@pytest.mark.parametrize(
    ("quant_min", "quant_max", "symmetric", "scale", "zero_point"),
    [
        (-128, 127, True, 2 * 6 / 255, 0),
        (-127, 127, True, 6 / 127, 0),
        (0, 255, True, 2 * 6 / 255, 128),
        (-128, 127, False, 8 / 255, 63),  # -128 - round(-6 · 255 / 8) = -128 + 191
        (0, 15, False, 8 / 15, 11),  # round(6 · 15 / 8) = round(11.25)
    ],
)
def test_qparams_by_hand(quant_min, quant_max, symmetric, scale, zero_point):
    b = buffers()
    fake_quantize_observed(tensor([2.0, -6.0, 0.5]), *b, quant_min, quant_max, symmetric=symmetric)
    assert b[2].item() == pytest.approx(scale) and b[3].item() == zero_point


@pytest.mark.parametrize(
    ("quant_min", "quant_max", "middle"),
    [(0, 255, 128), (1, 255, 128), (0, 3, 2), (10, 20, 15), (10, 21, 16), (100, 120, 110)],
)
def test_the_zero_point_of_a_symmetric_range_is_its_middle(quant_min, quant_max, middle):
    b = buffers()
    y = fake_quantize_observed(tensor([-1.0, 1.0]), *b, quant_min, quant_max, symmetric=True)
    assert b[3].item() == middle
    # one code at most is missing on one side
    torch.testing.assert_close(y, tensor([-1.0, 1.0]), rtol=0, atol=1.01 * b[2].item())


def test_the_scale_of_a_huge_symmetric_range_is_finite():
    b = buffers()
    y = fake_quantize_observed(tensor([-1.0, 3e38]), *b, -128, 127, symmetric=True)
    assert b[2].item() == pytest.approx(3e38 / 127.5)
    assert y.isfinite().all()


def test_range_always_holds_zero():
    b = buffers()
    y = fake_quantize_observed(tensor([4.0, 5.0, 0.0][:2]), *b, 0, 255)
    assert b[3].item() == 0 and b[2].item() == pytest.approx(5 / 255)
    assert y.max().item() == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ch_axis", [None, 1, -1])
@pytest.mark.parametrize("relu", [False, True])
def test_is_observer_then_fake_quantize(dtype, ch_axis, relu):
    x = randn(4, 3, 5, dtype=dtype).requires_grad_()
    n = None if ch_axis is None else x.shape[ch_axis]
    b = buffers(n)
    y = fake_quantize_observed(x, *b, 0, 255, ch_axis, relu=relu)
    plain = x.detach().clone().requires_grad_()
    positive = plain.relu() if relu else plain
    dims = [d for d in range(3) if ch_axis is None or d != ch_axis % 3]
    low, high = positive.detach().amin(dims).float(), positive.detach().amax(dims).float()
    assert torch.equal(b[0], low) and torch.equal(b[1], high)
    wanted = fake_quantize(positive, b[2], b[3], 0, 255, ch_axis)
    assert torch.equal(y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    assert torch.equal(x.grad, plain.grad)
    assert 0 < x.grad.sum() < x.numel() or not relu


def test_delayed_quantizes_with_the_range_before_this_batch():
    b = buffers()
    fake_quantize_observed(tensor([-1.0, 1.0]), *b, -128, 127)
    before = [t.clone() for t in b]
    x = tensor([-3.0, 0.3, 3.0])
    y = fake_quantize_observed(x, *b, -128, 127, mode="delayed", averaging_constant=0.5)
    assert torch.equal(y, fake_quantize(x, before[2], before[3], -128, 127))
    assert (b[0].item(), b[1].item()) == (-2.0, 2.0) and b[2] > before[2]


@pytest.mark.parametrize("options", [{"observe": False}, {"mode": "frozen"}])
def test_frozen_leaves_the_buffers(options):
    b = buffers()
    fake_quantize_observed(tensor([-1.0, 1.0]), *b, -128, 127)
    before = [t.clone() for t in b]
    fake_quantize_observed(tensor([-9.0, 9.0]), *b, -128, 127, **options)
    assert all(torch.equal(now, then) for now, then in zip(b, before, strict=True))


@pytest.mark.parametrize("relu", [False, True])
def test_observing_only_returns_the_input(relu):
    b = buffers()
    x = tensor([-1.26, 3.1]).requires_grad_()
    y = fake_quantize_observed(x, *b, 0, 255, fake_quant=False, relu=relu)
    assert torch.equal(y, x.relu() if relu else x)
    assert b[0].item() == pytest.approx(0.0 if relu else -1.26)
    untouched = buffers()
    fake_quantize_observed(x, *untouched, 0, 255, fake_quant=False, observe=False)
    assert untouched[0].item() == INF


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize("ch_axis", [None, 0])
def test_a_bad_batch_does_not_spoil_the_range(bad, ch_axis):
    b = buffers(None if ch_axis is None else 2)
    fake_quantize_observed(tensor([[-1.0, 1.0], [-2.0, 2.0]]), *b, -128, 127, ch_axis)
    before = [t.clone() for t in b]
    x = tensor([[bad, 5.0], [-3.0, 4.0]])
    y = fake_quantize_observed(x, *b, -128, 127, ch_axis, averaging_constant=1.0)
    assert y[0, 0].isnan() if bad != bad else y[0, 0].isfinite()  # saturated
    assert torch.equal(b[0].view(-1)[0], before[0].view(-1)[0])
    assert all(t.isfinite().all() for t in b)
    if ch_axis == 0:  # the good channel is observed
        assert b[1][1].item() == 4.0


def test_a_first_batch_of_nan_keeps_the_initial_state():
    b = buffers()
    y = fake_quantize_observed(tensor([float("nan"), 1.0]), *b, -128, 127)
    assert y[0].isnan() and b[0].item() == INF and b[2].item() == 1.0 and b[3].item() == 0


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_input(value):
    b = buffers()
    x = torch.full((10,), value)
    y = fake_quantize_observed(x, *b, 0, 255)
    torch.testing.assert_close(y, x)
    assert b[2] > 0


def test_empty_batch_changes_nothing():
    b = buffers()
    y = fake_quantize_observed(torch.zeros(0, 3), *b, 0, 255)
    assert y.shape == (0, 3) and b[0].item() == INF


def test_double_backward():
    x = randn(50).requires_grad_()
    v = randn(50, seed=1).requires_grad_()
    y = fake_quantize_observed(x, *buffers(), 0, 255, relu=True)
    (grad,) = torch.autograd.grad(y, x, v, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), v)
    torch.testing.assert_close(second, 2 * v * (x > 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "lazy"}, "mode: wanted one of exact, delayed, frozen, got 'lazy'"),
        ({"averaging_constant": 0.0}, "averaging_constant: wanted a value in"),
        ({"ch_axis": 0}, r"running_min: wanted shape \[3\]"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        fake_quantize_observed(torch.zeros(3), *buffers(), 0, 255, **change)


def test_buffers_that_are_not_contiguous_are_written_back():
    x = randn(4, 3, 5)
    table = torch.full((3, 2), INF)
    scale, zero_point = torch.ones(6)[::2], torch.zeros(6, dtype=torch.int32)[::2]
    torch.ops.divqat.observe(
        x, table[:, 0], table[:, 1].neg_(), scale, zero_point, 0, 255, 1, 0.1, False, False
    )
    assert torch.equal(table[:, 0], x.amin((0, 2))) and torch.equal(table[:, 1], x.amax((0, 2)))
    assert (scale < 1).all() and (zero_point > 0).all()
