"""The compiled kernels against the references they replace."""

import backends
import pytest
import torch
from testing import (
    DTYPES,
    axes,
    close_to_float64,
    loss_cases,
    qparams_along,
    randn,
    same,
    tensor,
    variants,
)

from divqat import ops
from divqat.ops import _native

extension = _native.extension
if extension is None:
    pytest.skip(f"no native kernels: {_native.missing('cpu')}", allow_module_level=True)

NAN, INF = float("nan"), float("inf")
call = torch.ops.divqat
SETS = extension.instruction_sets()


def both(isa, function):
    """What the native kernels and the references answer."""
    results = []
    for name in (isa, "torch"):
        with backends.serving(name):
            results.append(function())
    return results


def awkward(dtype, seed=0):
    """Inputs whose sizes fit no register, and some that several threads share."""
    shapes = [(1,), (7,), (63,), (64,), (65,), (3, 5, 7, 7), (2, 130, 3, 3), (5, 16, 1, 1)]
    for i, shape in enumerate(shapes):
        yield randn(*shape, dtype=dtype, seed=seed + i).mul_(4)
    large = randn(6, 9, 71, 73, dtype=dtype, seed=seed).mul_(4)
    yield large
    # How strides are taken does not depend on the dtype.
    yield from variants(large) if dtype == torch.float32 else list(variants(large))[-1:]
    # the address of a slice is not that of a register
    yield randn(1000, dtype=dtype).mul_(4)[3:]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_bit_equal(isa, dtype):
    for x in awkward(dtype):
        for ch_axis in axes(x):
            for propagate in (True, False):
                args = (x, *qparams_along(x, ch_axis), -60, 61, ch_axis, propagate)
                same(*both(isa, lambda args=args: call.fake_quantize(*args)))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_gradient_is_bit_equal(isa, dtype):
    for x in awkward(dtype):
        grad = torch.empty_like(x).copy_(x)
        mask = torch.randint(0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8)
        same(*both(isa, lambda g=grad, m=mask: [call.fake_quantize_backward(g, m)]))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3])
def test_large_tensors_are_written_past_the_cache_and_bit_equal(isa, dtype, offset):
    n = (9 << 20) // dtype.itemsize + 37  # more than kStreamBytes
    x = torch.randn(n + offset, dtype=torch.float32).to(dtype)[offset:]
    x[100] = NAN
    q = (tensor(0.02), torch.tensor(3, dtype=torch.int32))
    native, reference = both(isa, lambda: call.fake_quantize(x, *q, -60, 61, None, True))
    same(native, reference)
    grad, mask = torch.ones_like(x), native[1]
    same(*both(isa, lambda: [call.fake_quantize_backward(grad, mask)]))
    rows = [x[: n // 1000 * 1000].view(1000, -1)] * 4  # together more than kCacheBytes
    args = (-127, 127, 0)
    same(*both(isa, lambda: call.fake_quantize_weights(rows, *args)))
    same(*both(isa, lambda: call.fake_quantize_weights_backward(rows, rows, *args)))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_observed_is_bit_equal_buffers_included(isa, dtype, symmetric):
    for x in awkward(dtype):
        for ch_axis in axes(x):
            n = [] if ch_axis is None else [x.shape[ch_axis]]

            def steps(x=x, ch_axis=ch_axis, n=n):
                buffers = [torch.full(n, INF), torch.full(n, -INF), torch.ones(n), torch.zeros(n)]
                buffers[3] = buffers[3].int()
                outputs = []
                for i, mode in enumerate(("exact", "delayed", "frozen", "exact")):
                    batch = x * (1 + 0.3 * i)
                    rest = (0, 255, ch_axis, 0.1, symmetric)
                    relu = i % 2 == 1
                    outputs += call.fake_quantize_observed(batch, *buffers, *rest, mode, relu)
                    call.observe(-batch, *buffers, *rest, relu)
                    outputs += [b.clone() for b in buffers]
                return outputs

            same(*both(isa, steps))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lsq_is_bit_equal_and_its_sums_are_close(isa, dtype):
    for x in awkward(dtype):
        for ch_axis in axes(x):
            scale, _ = qparams_along(x, ch_axis)
            zero_point = torch.linspace(-3.4, 9.6, scale.numel()).view_as(scale)
            args = (scale, zero_point, -8, 7, ch_axis)
            same(*both(isa, lambda x=x, args=args: [call.fake_quantize_lsq(x, *args)]))
            grad = randn(*x.shape, dtype=dtype, seed=9)
            native, reference = both(
                isa,
                lambda x=x, g=grad, args=args: call.fake_quantize_lsq_backward(g, x, *args, 0.3),
            )
            same(native[:1], reference[:1])
            # sums differ by their order: terms of a few units, as many as share a scale
            per_scale = x.numel() // scale.numel()
            tolerance = {"rtol": 1e-5, "atol": 1e-6 * per_scale, "equal_nan": True}
            torch.testing.assert_close(native[1:], reference[1:], **tolerance)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_bit_equal(isa, dtype):
    weights = [w for w in awkward(dtype) if w.dim() > 1]
    weights += [torch.zeros(4, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype)]
    for ch_axis in (0, 1, -1, None):
        args = (-127, 127, ch_axis)
        same(*both(isa, lambda args=args: call.fake_quantize_weights(weights, *args)))
        grads = [torch.randn_like(w) for w in weights]
        args = (grads, weights, *args)
        same(*both(isa, lambda args=args: call.fake_quantize_weights_backward(*args)))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_at_the_edge_of_the_range(isa, dtype):
    """With levels -128 to 127 the largest weight of a row lies on a tie, which its last digit
    decides."""
    weights = [randn(2000, 5, dtype=dtype, seed=seed) for seed in range(2)]
    grads = [torch.ones_like(w) for w in weights]
    args = (grads, weights, -128, 127, 0)
    native, reference = both(isa, lambda: call.fake_quantize_weights_backward(*args))
    same(native, reference)
    assert any((grad == 0).any() for grad in native)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ch_axis", [None, 0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_number_of_threads_changes_no_bit(isa, dtype, ch_axis, channels_last):
    x = randn(9, 70, 17, 19, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    n = [] if ch_axis is None else [x.shape[ch_axis]]
    scale, zero_point = torch.full(n, 0.02), torch.full(n, 0.4)
    logits = randn(333, 17, dtype=dtype)
    target = torch.arange(333) % 17

    def everything():
        buffers = [torch.full(n, INF), torch.full(n, -INF), torch.ones(n), torch.zeros(n).int()]
        rest = (0, 255, ch_axis, 0.1, False, "exact", True)
        return [
            *call.fake_quantize_observed(x, *buffers, *rest),
            *buffers,
            *call.fake_quantize_lsq_backward(x, x, scale, zero_point, -50, 49, ch_axis, 1.0),
            *call.fake_quantize_weights([x, x[0]], -127, 127, ch_axis),
            *call.divergence_loss(
                logits, -logits, target, tensor(0.3), 4.0, "js", "all", None, True, 0.1, -100
            ),
        ]

    threads = torch.get_num_threads()
    results = []
    try:
        with backends.serving(isa):
            for n_threads in (1, 2, 3):
                torch.set_num_threads(n_threads)
                results.append(everything())
    finally:
        torch.set_num_threads(threads)
    same(results[0], results[1])
    same(results[0], results[2])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student", "js"])
def test_loss_agrees_with_the_reference(isa, dtype, direction):
    shapes = ((0, 5), (1, 1), (3, 2), (40, 10), (7, 15), (7, 16), (7, 17), (5, 1003))
    for logits, teacher, *args in loss_cases(dtype, direction, shapes):
        with backends.serving(isa):
            native = call.divergence_loss(logits, teacher, *args)
        with ops.backend("torch"):
            wanted = call.divergence_loss(logits.double(), teacher.double(), *args)
        close_to_float64(native, wanted)


@pytest.mark.parametrize("isa", SETS)
def test_loss_lets_nan_through_in_its_row_only(isa):
    logits, teacher = randn(3, 20), randn(3, 20, seed=1)
    logits[1, 7] = NAN
    args = (torch.tensor([1, 2, 3]), tensor(0.2), 4.0, "student_teacher", "all", None, False, 0.0)
    with backends.serving(isa):
        loss, ce, _, grad = call.divergence_loss(logits, teacher, *args, -100)
    assert loss.isnan() and ce.isnan()
    assert grad[1].isnan().all() and grad[::2].isfinite().all()


def test_a_target_that_is_no_class_is_named():
    logits = randn(3, 4)
    with pytest.raises(IndexError, match=r"target: wanted a class in \[0, 4\).*got 4 at 2"):
        ops.divergence_loss(logits, logits, torch.tensor([0, 3, 4]), weight=0.1)
