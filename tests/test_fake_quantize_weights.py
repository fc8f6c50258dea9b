"""fake_quantize_weights against torch's per-channel op with scales worked out in float64."""

import pytest
import torch
from backends import INTERPRETED
from testing import DTYPES, bits, randn, tensor

from divqat.ops import fake_quantize_weights

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(8, 4, 3, 3), (5, 7), (6, 1, 3, 3), (1,), (3, 2, 1, 1)]


def scales(w, ch_axis, levels):
    rows = w.double().movedim(ch_axis, 0).flatten(1) if w.dim() > 1 else w.double()[:, None]
    doubled = 2 * rows.abs().amax(1).float()
    # a number would be multiplied with its reciprocal on CUDA
    return (doubled / torch.full_like(doubled, levels)).clamp(min=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_min", "quant_max"), [(-127, 127), (-128, 127), (-7, 7)])
def test_equals_torch_per_channel(dtype, quant_min, quant_max):
    weights = [
        randn(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)
    ]
    outputs = fake_quantize_weights(weights, quant_min, quant_max)
    cotangents = [randn(*shape, dtype=dtype, seed=9 + i) for i, shape in enumerate(SHAPES)]
    grads = torch.autograd.grad(outputs, weights, cotangents)
    for w, y, grad, cotangent in zip(weights, outputs, grads, cotangents, strict=True):
        scale = scales(w.detach(), 0, quant_max - quant_min)
        zero_point = torch.zeros(len(scale), dtype=torch.int32)
        plain = w.detach().requires_grad_()
        wanted = torch.fake_quantize_per_channel_affine(
            plain, scale, zero_point, 0, quant_min, quant_max
        )
        assert torch.equal(bits(y), bits(wanted))
        assert torch.equal(grad, torch.autograd.grad(wanted, plain, cotangent)[0])


@pytest.mark.parametrize("ch_axis", [1, -1])
def test_another_axis(ch_axis):
    w = randn(3, 4, 5)
    scale = scales(w, ch_axis % 3, 254)
    zero_point = torch.zeros(len(scale), dtype=torch.int32)
    wanted = torch.fake_quantize_per_channel_affine(w, scale, zero_point, ch_axis % 3, -127, 127)
    assert torch.equal(fake_quantize_weights([w], -127, 127, ch_axis)[0], wanted)


def test_one_scale_per_weight():
    w = tensor([[1.0, 0.5], [0.1, -2.0]])
    (y,) = fake_quantize_weights([w], -2, 2, ch_axis=None)
    assert y.tolist() == [[1.0, 0.0], [0.0, -2.0]]  # scale 1; 0.5 rounds to even


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_max", [1, 7, 127, 2**16 - 1])
def test_codes_symmetric_about_zero_clip_nothing_and_save_nothing(dtype, quant_max, backend):
    # any magnitude, the smallest and largest numbers included; a row is long for the interpreter
    rows = 28 if backend == INTERPRETED else 512
    w = randn(rows, 9, dtype=torch.float64, seed=quant_max)
    w *= 10.0 ** torch.linspace(-45, 38, rows, dtype=torch.float64)[:, None]
    finite = torch.finfo(dtype).max
    w = w.clamp(-finite, finite).to(dtype)
    mask = torch.ops.divqat.fake_quantize_weights_backward(
        [torch.ones_like(w)], [w], -quant_max, quant_max, 0
    )[0]
    assert mask.min() == 1.0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (y,) = fake_quantize_weights([w.requires_grad_()], -quant_max, quant_max)
    grad = randn(rows, 9, dtype=dtype, seed=1)
    assert torch.equal(torch.autograd.grad(y, w, grad)[0], grad) and not saved


def test_zero_row_nan_row_and_empty():
    w = tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, -1.0]])
    (y,) = fake_quantize_weights([w], -127, 127)
    assert y[0].tolist() == [0.0, 0.0] and y[1].isnan().all() and y[2].tolist() == [1.0, -1.0]
    assert fake_quantize_weights([], -127, 127) == []
    assert fake_quantize_weights([torch.zeros(0, 3)], -127, 127)[0].shape == (0, 3)


def test_unused_outputs_and_double_backward():
    a, b = randn(4, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    first, _ = fake_quantize_weights([a, b], -128, 127)
    v = randn(4, 3, seed=2).requires_grad_()
    grad_a, grad_b = torch.autograd.grad(first, (a, b), v, create_graph=True, allow_unused=True)
    assert grad_b is None or not grad_b.any()
    (second,) = torch.autograd.grad(grad_a.square().sum(), v)
    torch.testing.assert_close(second, 2 * v * (grad_a.detach() != 0))


def test_keeps_layout():
    w = randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    (y,) = fake_quantize_weights([w], -127, 127)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, fake_quantize_weights([w.contiguous()], -127, 127)[0])


def test_bad_weight_is_named():
    with pytest.raises(TypeError, match=r"weights\[1\]: wanted float32"):
        fake_quantize_weights([torch.zeros(2), torch.zeros(2, dtype=torch.int8)], -127, 127)
    with pytest.raises(IndexError, match=r"weights\[0\] with 1 dims, got 1"):
        fake_quantize_weights([torch.zeros(2)], -127, 127, ch_axis=1)
