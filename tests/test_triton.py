"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the references.

The op suites run over them too. All of that is a process of its own, with TRITON_INTERPRET=1
(``make test-triton``): Triton decides when a kernel is defined.
"""

import threading

import backends
import pytest
import torch
from testing import (
    DTYPES,
    close_to_float64,
    loss_cases,
    qparams_along,
    randn,
    same,
    tensor,
    variants,
)

from divqat import ops
from divqat.ops import _triton

if not _triton.interpreted() or _triton.missing("cpu"):
    pytest.skip("runs with TRITON_INTERPRET=1: make test-triton", allow_module_level=True)

import triton
import triton.language as tl
from divqat.kernels import (
    _channel_reduction,
    _launch,
    divergence_loss,
    fake_quantize,
    fake_quantize_observed,
)
from divqat.kernels._math import ceil_div

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # numpy warns where the device would not: NaN and infinities are part of these tests
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
call = torch.ops.divqat
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def counters_are_zero_again():
    yield
    assert not _launch.counters(torch.device("cpu")).any()


def both(function):
    """What the Triton kernels and the references answer."""
    results = []
    for name in (backends.INTERPRETED, "torch"):
        with backends.serving(name):
            results.append(function())
    return results


def awkward(dtype, few=None):
    """Inputs around the sizes of a word, a tile and two tiles, in every layout, each with the axes
    that make a difference: the interpreter takes as long for a program as for a launch. Layouts
    are the same to all dtypes, which differ in how a value is loaded, computed and stored: those
    but float32 are given ``few``."""

    def values(*shape):
        return randn(*shape, dtype=dtype, seed=sum(shape)).mul_(4)

    if dtype != torch.float32 if few is None else few:
        yield from ((values(n), None) for n in (31, 1025))
        large = values(2, 5, 13, 9)
        yield from ((x, axis) for x in [*variants(large)][-2:] for axis in (None, 1))
        return
    for n in (1, 31, 33, 1024, 1025, 2500):
        yield values(n), None
    for n in (1, 33, 130):  # channels, of which 64 are a tile
        yield values(n), 0
    yield values(2, 12, 3, 3), 1  # short runs, as an axis in the middle has, too
    large = values(2, 5, 13, 9)
    yield from ((large, axis) for axis in (0, 3))
    yield from ((x, axis) for x in (large, *variants(large)) for axis in (None, 1))
    yield values(1000)[3:], None
    yield torch.tensor(0.3, dtype=dtype), None
    yield from ((torch.zeros(0, 3, dtype=dtype), axis) for axis in (None, 0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_bit_equal(dtype):
    for x, ch_axis in awkward(dtype):
        args = (x, *qparams_along(x, ch_axis), -60, 61, ch_axis)
        for propagate in (True, False):
            triton, wanted = both(lambda a=args, p=propagate: call.fake_quantize(*a, p))
            same(triton, wanted)
        grad = torch.empty_like(triton[0]).copy_(x)
        same(*both(lambda g=grad, m=wanted[1]: [call.fake_quantize_backward(g, m)]))


# what is symmetric is one value per channel, a float32 whatever the dtype of x
@pytest.mark.parametrize(
    ("dtype", "symmetric"), [(torch.float32, False), *((dtype, True) for dtype in DTYPES)]
)
def test_observed_is_bit_equal_buffers_included(dtype, symmetric):
    for x, ch_axis in awkward(dtype, few=symmetric):
        n = [] if ch_axis is None else [x.shape[ch_axis]]

        def steps(x=x, ch_axis=ch_axis, n=n):
            buffers = [torch.full(n, INF), torch.full(n, -INF), torch.ones(n), torch.zeros(n)]
            buffers[3] = buffers[3].int()
            outputs = []
            rest = (0, 255, ch_axis, 0.1, symmetric)
            for i, mode in enumerate(("exact", "delayed", "frozen")):
                relu = i % 2 == 1
                batch = x * (1 + 0.3 * i)
                outputs += call.fake_quantize_observed(batch, *buffers, *rest, mode, relu)
                outputs += [b.clone() for b in buffers]
            for relu in (False, True):
                call.observe(-x, *buffers, *rest, relu)
                outputs += [b.clone() for b in buffers]
            return outputs

        same(*both(steps))


@pytest.mark.parametrize("ch_axis", [None, 1])
@pytest.mark.parametrize("mode", ["exact", "delayed", "frozen"])
def test_over_its_input_it_is_bit_equal(ch_axis, mode):
    x = randn(2, 130, 3, 3).to(memory_format=torch.channels_last)  # more than two tiles
    n = [] if ch_axis is None else [x.shape[ch_axis]]
    mine, wanted = (
        [torch.full(n, -2.0), torch.full(n, 2.0), torch.full(n, 0.01), torch.ones(n).int()]
        for _ in range(2)
    )
    rest = (0, 255, ch_axis, 0.1, False, mode, True)
    y, mask = call.fake_quantize_observed(x, *wanted, *rest)
    bits = call.fake_quantize_observed_inplace(x, *mine, *rest)
    same([x, bits, *mine], [y, mask, *wanted])
    with pytest.raises(ValueError, match="x: wanted dense memory"):
        call.fake_quantize_observed_inplace(x[:, ::2], *mine, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lsq_is_bit_equal_and_its_sums_are_close(dtype):
    for x, ch_axis in awkward(dtype):
        scale, _ = qparams_along(x, ch_axis)
        zero_point = torch.linspace(-3.4, 9.6, scale.numel()).view_as(scale)
        args = (scale, zero_point, -8, 7, ch_axis)
        same(*both(lambda x=x, args=args: [call.fake_quantize_lsq(x, *args)]))
        grad = randn(*x.shape, dtype=dtype, seed=9)
        triton, wanted = both(
            lambda x=x, g=grad, args=args: call.fake_quantize_lsq_backward(g, x, *args, 0.3)
        )
        same(triton[:1], wanted[:1])
        per_scale = x.numel() // max(1, scale.numel())
        tolerance = {"rtol": 1e-5, "atol": 1e-6 * max(1, per_scale), "equal_nan": True}
        torch.testing.assert_close(triton[1:], wanted[1:], **tolerance)


# where codes are symmetric, gradients pass; how weights are loaded and stored is the same
@pytest.mark.parametrize(
    ("quant_min", "dtype"), [(-127, torch.float32), *((-128, dtype) for dtype in DTYPES)]
)
def test_weights_are_bit_equal(dtype, quant_min):
    """Several weights in one launch, rows on 16 bytes and off them, longer than a tile, NaN."""
    weights = [randn(6, 5, 3, 3, dtype=dtype), randn(4, 1600, dtype=dtype, seed=3)]
    weights += [weights[0].repeat(1, 1, 2, 2).to(memory_format=torch.channels_last)]
    weights += [randn(5, 16, dtype=dtype).t(), randn(3, 5, dtype=dtype)[:, ::2]]
    weights += [torch.zeros(4, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype)]
    weights[0][1, 1, 1, 1] = NAN
    grads = [torch.randn(w.shape).to(dtype) for w in weights]
    for ch_axis in (0, 1, -1, None) if quant_min == -127 else (0, None):
        args = (weights, quant_min, 127, ch_axis)
        same(*both(lambda args=args: call.fake_quantize_weights(*args)))
        same(*both(lambda args=args: call.fake_quantize_weights_backward(grads, *args)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student", "js"])
def test_loss_agrees_with_the_reference(dtype, direction):
    shapes = ((0, 5), (1, 1), (3, 2), (40, 10), (7, 17), (5, 1003), (1, 4096), (2, 4097))
    if dtype != torch.float32:
        shapes = ((7, 17), (2, 4097))  # of each kernel
    for logits, teacher, *args in loss_cases(dtype, direction, shapes):
        triton = call.divergence_loss(logits, teacher, *args)
        with ops.backend("torch"):
            wanted = call.divergence_loss(logits.double(), teacher.double(), *args)
        close_to_float64(triton, wanted)


@pytest.mark.parametrize("c", [20, 5000])
def test_loss_lets_nan_through_in_its_row_only(c):
    logits, teacher = randn(3, c), randn(3, c, seed=1)
    logits[1, 7] = NAN
    args = (torch.tensor([1, 2, 3]), tensor(0.2), 4.0, "student_teacher", "all", None, False, 0.0)
    loss, ce, _, grad = call.divergence_loss(logits, teacher, *args, -100)
    assert loss.isnan() and ce.isnan()
    assert grad[1].isnan().all() and grad[::2].isfinite().all()


def test_a_target_that_is_no_class_gives_nan_as_no_error_can_be_raised():
    args = (torch.tensor([0, 4]), tensor(0.2), 4.0, "js", "all", None, False, 0.0, -100)
    loss, *_, grad = call.divergence_loss(randn(2, 4), randn(2, 4, seed=1), *args)
    assert loss.isnan() and grad[1].isnan().all() and grad[0].isfinite().all()


def test_many_samples_are_counted_by_a_launch_of_its_own():
    n = divergence_loss.MAX_REDUNDANT_COUNT + 5
    target = torch.arange(n) % 2
    target[::3] = -1
    args = (target, tensor(0.2), 4.0, "student_teacher", "all", None, False, 0.0, -1)
    triton, wanted = both(lambda: call.divergence_loss(randn(n, 2), randn(n, 2, seed=1), *args))
    torch.testing.assert_close(triton, wanted, rtol=1e-5, atol=1e-8)


def test_large_tensors_and_many_parts(monkeypatch):
    for module in (_launch, _channel_reduction):
        monkeypatch.setattr(module, "SMALL", 1 << 13)
    x = randn((1 << 14) + 4321)  # runs of 4096, more than there are parts
    start = [INF, -INF, 1.0]
    for mode in ("exact", "delayed"):

        def step(mode=mode):
            buffers = [*map(tensor, start), torch.zeros((), dtype=torch.int32)]
            rest = (0, 255, None, 0.1, False, mode, True)
            return [*call.fake_quantize_observed(x, *buffers, *rest), *buffers]

        same(*both(step))
    lsq = (tensor(0.05), tensor(3.0), -128, 127, None, 1.0)
    triton, wanted = both(lambda: call.fake_quantize_lsq_backward(x, x, *lsq))
    exact = call.fake_quantize_lsq_backward(x.double(), x.double(), *lsq)
    same(triton[:1], wanted[:1])
    torch.testing.assert_close(triton[1:], exact[1:], rtol=1e-5, atol=1e-3)
    same(triton, call.fake_quantize_lsq_backward(x, x, *lsq))  # deterministic


def test_64_bit_offsets_give_the_same(monkeypatch):
    x, logits = randn(2, 3, 40, 17), randn(5, 7)

    def everything():
        scale, zero_point = qparams_along(x, 1)
        y, mask = call.fake_quantize(x, scale, zero_point, -60, 61, 1, True)
        buffers = [torch.full([3], INF), torch.full([3], -INF), torch.ones(3), torch.zeros(3).int()]
        rest = (0, 255, 1, 0.1, False, "exact", True)
        observed = call.fake_quantize_observed(x, *buffers, *rest)
        single = [tensor(-6.0), tensor(6.0), tensor(0.05), torch.tensor(3, dtype=torch.int32)]
        delayed = call.fake_quantize_observed(x, *single, 0, 255, None, 0.1, False, "delayed", True)
        lsq = call.fake_quantize_lsq_backward(x, x, scale, scale, -8, 7, 1, 0.3)
        grad = logits.clone()
        call.divergence_loss_backward(grad, tensor(0.3))
        masked = call.fake_quantize_backward(x, mask)
        return [y, mask, masked, *buffers, *observed, *single, *delayed, *lsq, grad]

    narrow = everything()
    for module in (_channel_reduction, divergence_loss, fake_quantize, fake_quantize_observed):
        monkeypatch.setattr(module, "WIDE", 0)
    same(narrow, everything())


def test_dense_layouts_are_not_copied():
    x = randn(2, 3, 4, 5)
    for layout in (x, x.to(memory_format=torch.channels_last), x.permute(2, 0, 3, 1)):
        assert _launch.dense(layout)[0] is layout
    assert _launch.dense(x[:, ::2])[0].is_contiguous()


def test_launches_do_not_share_a_counter_for_long():
    counters = _launch._Counters(torch.device("cpu"))
    first, second = counters.take(3), counters.take(1)
    assert second.data_ptr() == first.data_ptr() + 16
    counters.take(counters.HALF - 8)
    assert counters.take(2).data_ptr() == first.data_ptr()


@pytest.mark.parametrize(
    ("name", "args", "error", "words"),
    [
        ("fake_quantize", {1: torch.ones(2)}, ValueError, r"scale: wanted 1 contiguous value"),
        ("fake_quantize_backward", {1: torch.zeros(1).byte()}, ValueError, "mask: wanted 2"),
        ("fake_quantize_backward", {1: torch.zeros(2)}, TypeError, "mask: wanted uint8"),
        ("fake_quantize_backward", {0: randn(9, 4)[:, ::2]}, ValueError, "grad_y: wanted a dense"),
    ],
)
def test_the_launchers_check_what_a_kernel_reads_through_a_pointer(name, args, error, words):
    given = {
        "fake_quantize": [randn(9), tensor(0.1), torch.tensor(0).int(), -8, 7, None, True],
        "fake_quantize_backward": [randn(9), torch.zeros(2, dtype=torch.uint8)],
    }[name]
    for i, value in args.items():
        given[i] = value
    with pytest.raises(error, match=words):
        getattr(call, name)(*given)


@triton.jit
def _tile_bounds(out, n, tile, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """How many tiles and mask words n elements have, and the ends of a tile."""
    i = fake_quantize.offsets(tile, BLOCK, WIDE)
    tl.store(out, ceil_div(n, BLOCK))
    tl.store(out + 1, ceil_div(n, 32))
    tl.store(out + 2, tl.min(i, 0))
    tl.store(out + 3, tl.max(i, 0))
    tl.store(out + 4, tl.sum((i < n).to(tl.int32), 0))


@pytest.mark.parametrize("n", [1, 4096, 4097, *range(2**31 - 3, 2**31 + 3), 2**31 + 4097])
@pytest.mark.parametrize("edge", [0, -(2**16), -(2**16) + 1])
def test_index_arithmetic_near_two_to_the_31(n, edge):
    """Tiles, words and offsets of n elements in one program, against Python's integers."""
    n = max(1, n + edge)
    tiles = -(-n // 4096)
    out = torch.zeros(5, dtype=torch.int64)
    _tile_bounds[(1,)](out, n, tiles - 1, BLOCK=4096, WIDE=n > _launch.WIDE)
    first = 4096 * (tiles - 1)
    assert out.tolist() == [tiles, -(-n // 32), first, first + 4095, n - first]


def test_counters_are_allocated_by_another_thread_than_launches(monkeypatch):
    """What a thread allocates in the warm-up of a graph is that graph's, and is used again."""
    threads, zeros = [], _launch._zeros

    def noted(*args):
        threads.append(threading.get_ident())
        return zeros(*args)

    monkeypatch.setattr(_launch, "_zeros", noted)
    made = _launch._Counters(torch.device("cpu"))
    assert not made.take(3).any() and threads != [threading.get_ident()]
