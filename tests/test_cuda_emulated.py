"""The CUDA kernels of fake_quantize, its observer and the weights, run by the emulator on CPU
tensors: bit for bit what the references give, in the number of launches that was promised."""

import math

import pytest
import torch
from backends import launches
from cuda_emulator.build import why_not
from testing import DTYPES, axes, close_to_float64, qparams_along, randn, same, variants

from divqat.ops import reference
from divqat.ops._mask import unpack_mask, with_packed_mask
from divqat.ops.reference_loss import divergence_loss_ref

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

INF, NAN = math.inf, math.nan
call = torch.ops.divqat
fake_quantize = with_packed_mask(reference.fake_quantize_ref)
fake_quantize_observed = with_packed_mask(reference.fake_quantize_observed_ref)


@pytest.fixture(autouse=True)
def emulator(emulated_kernels):
    """Every launch leaves the counters of its last block as it found them."""
    yield emulated_kernels
    assert emulated_kernels.counters_are_zero()


def inputs(dtype):
    """Sizes around those of packs, warps and tiles, layouts, addresses and values that are awkward.

    The emulated device holds six blocks, so the larger ones take several rounds of tiles.
    """
    for n in (1, 7, 8, 9, 31, 32, 33, 1023, 1025, 4096, 4097, 8191):
        yield randn(n, dtype=dtype, seed=n).mul_(4)
    yield randn(70001, dtype=dtype).mul_(4)
    for shape in ((3, 5, 7, 7), (2, 130, 3, 3), (5, 16, 1, 1), (3, 64, 8, 8)):
        yield randn(*shape, dtype=dtype).mul_(4)
    large = randn(6, 9, 41, 43, dtype=dtype, seed=1).mul_(4)
    yield large
    # How strides are taken does not depend on the dtype.
    yield from variants(large) if dtype == torch.float32 else list(variants(large))[-1:]
    for first in (1, 3):  # off 16 bytes, more than one tile
        yield randn(9000, dtype=dtype).mul_(4)[first:]
        yield randn(9001, dtype=dtype).mul_(4)[first : 8998 + first].view(2, 4499)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize(dtype):
    for x in inputs(dtype):
        for ch_axis in axes(x):
            for propagate in (True, False):
                args = (x, *qparams_along(x, ch_axis), -60, 61, ch_axis, propagate)
                same(call.fake_quantize(*args), fake_quantize(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_gradient(dtype):
    for x in inputs(dtype):
        grad = x if x.is_contiguous() else torch.empty_like(x).copy_(x)
        mask = torch.randint(0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8)
        same(
            [call.fake_quantize_backward(grad, mask)],
            [reference.fake_quantize_backward_ref(grad, unpack_mask(mask, grad))],
        )


def state(n):
    return [torch.full(n, INF), torch.full(n, -INF), torch.ones(n), torch.zeros(n).int()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_observed(dtype):
    for shape, x in enumerate(inputs(dtype)):
        for ch_axis in axes(x):
            n = [] if ch_axis is None else [x.shape[ch_axis]]
            mine, wanted = state(n), state(n)
            rest = (0, 255, ch_axis, 0.1, shape % 2 == 1)
            # Frozen is fake_quantize, which the test above gives the large inputs.
            modes = ("exact", "delayed", "frozen")[: 3 if x.numel() < 8192 else 2]
            for i, mode in enumerate(modes):
                batch, relu = x * (1 - 0.3 * i), i == shape % 3
                same(
                    call.fake_quantize_observed(batch, *mine, *rest, mode, relu),
                    fake_quantize_observed(batch, *wanted, *rest, mode, relu),
                )
                same(mine, wanted)
            call.observe(-x, *mine, *rest, True)
            reference.observe_ref(-x, *wanted, *rest, True)
            same(mine, wanted)


@pytest.mark.parametrize("ch_axis", [None, 0, 1])
def test_one_bad_element_anywhere_is_seen(ch_axis):
    """In the first or last lane, warp, block, round or part of a channel; one kind after another,
    which one and the same comparison finds."""
    places = (0, 31, 32, 255, 4095, 4096, 24576, 50000, 99999)
    for where, bad in zip(places, [NAN, INF, -INF] * 3, strict=True):
        x = randn(100, 1000)
        x.view(-1)[where] = bad
        n = [] if ch_axis is None else [x.shape[ch_axis]]
        mine, wanted = state(n), state(n)
        for mode in ("exact", "delayed"):
            rest = (0, 255, ch_axis, 0.1, False, mode, False)
            same(
                call.fake_quantize_observed(x, *mine, *rest),
                fake_quantize_observed(x, *wanted, *rest),
            )
            same(mine, wanted)


def weights(dtype):
    """Rows for a warp and for a block, of whole packs and not, and values that spoil a row."""
    shapes = [
        (8, 4, 3, 3),
        (5, 7),
        (6, 1, 3, 3),
        (1,),
        (3, 2, 1, 1),
        (17, 64),
        (3, 1023),
        (3, 1024),
    ]
    shapes += [(2, 1025), (2, 5000), (4, 4096), (0, 3), (4, 0)]
    found = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    found.append(randn(9, 8, 3, 3, dtype=dtype).to(memory_format=torch.channels_last))
    found.append(randn(6, 10, dtype=dtype)[:, ::2])
    found.append(randn(1000, dtype=dtype)[1:].view(9, 111))  # off 16 bytes
    found.append(randn(129, dtype=dtype)[1:].view(8, 16))
    for length in (40, 2000):
        spoilt = randn(5, length, dtype=dtype)
        spoilt[0, 3], spoilt[1, length - 1], spoilt[2, 0], spoilt[3] = NAN, INF, -INF, 0
        found.append(spoilt)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ch_axis", [0, -1, None])
@pytest.mark.parametrize("levels", [(-127, 127), (-128, 127), (-8, 7)])
def test_weights(dtype, ch_axis, levels):
    given = weights(dtype)
    args = (*levels, ch_axis)
    same(
        call.fake_quantize_weights(given, *args), reference.fake_quantize_weights_ref(given, *args)
    )
    grads = [randn(*w.shape, dtype=dtype, seed=7) for w in given]
    same(
        call.fake_quantize_weights_backward(grads, given, *args),
        reference.fake_quantize_weights_backward_ref(grads, given, *args),
    )


def test_float64_weights_at_the_edge_of_the_range():
    """With 255 levels the largest weight lies half a step beyond the last code, so that the last
    digits of float64 decide: they must not be lost where a row is judged by its extremes."""
    w = randn(4000, 3, dtype=torch.float64)
    w[:, 0] = w.abs().amax(1)
    grad = torch.ones_like(w)
    (mine,) = call.fake_quantize_weights_backward([grad], [w], -128, 127, 0)
    (wanted,) = reference.fake_quantize_weights_backward_ref([grad], [w], -128, 127, 0)
    assert 0 < int((wanted == 0).sum()) < 4000
    assert torch.equal(mine, wanted)


def launches_of_observed(emulator, mode, ch_axis):
    x = randn(200, 30, 5)
    buffers = state([] if ch_axis is None else [30])
    args = (x, *buffers, 0, 255, ch_axis, 0.1, False, mode, True)
    return launches(emulator, lambda: call.fake_quantize_observed(*args))[1]


def test_launches(emulator):
    x = randn(200, 30, 5)
    for ch_axis in (None, 1, 2):
        args = (x, *qparams_along(x, ch_axis), -60, 61, ch_axis, True)
        assert launches(emulator, lambda args=args: call.fake_quantize(*args))[1] == 1
    mask = torch.zeros(3750, dtype=torch.uint8)
    assert launches(emulator, lambda: call.fake_quantize_backward(x, mask))[1] == 1
    for mode in ("exact", "delayed", "frozen"):
        assert launches_of_observed(emulator, mode, None) == 1
        assert launches_of_observed(emulator, mode, 1) == (1 if mode == "frozen" else 2)
    observe = (x, *state([]), 0, 255, None, 0.1, False, False)
    assert launches(emulator, lambda: call.observe(*observe))[1] == 1


@pytest.fixture(params=["no cooperative launches", "too few free multiprocessors"])
def refusing(request, emulator):
    """A device on which blocks cannot wait for each other."""
    unable = request.param == "no cooperative launches"
    refuse = (lambda v: emulator.set_cooperative(not v)) if unable else emulator.set_crowded
    refuse(True)
    yield emulator
    refuse(False)


def test_where_cooperative_launches_are_refused_exact_takes_two(refusing):
    assert launches_of_observed(refusing, "exact", None) == 2
    assert launches_of_observed(refusing, "delayed", None) == 1
    for x in (randn(9), randn(50000), randn(50001)[1:]):
        mine, wanted = state([]), state([])
        rest = (0, 255, None, 0.1, False, "exact", True)
        same(
            call.fake_quantize_observed(x, *mine, *rest),
            fake_quantize_observed(x, *wanted, *rest),
        )
        same(mine, wanted)


def test_where_cooperative_launches_are_refused_a_loss_of_many_rows_takes_one(refusing):
    n = 8193  # up to 8192 targets, every block counts all of them anyway
    logits, teacher, target = randn(n, 3), randn(n, 3, seed=1), torch.arange(n) % 3
    target[5] = -100
    rest = (torch.tensor(0.3), 2.0, "js", "all", None, False, 0.0, -100)
    got, count = launches(refusing, lambda: call.divergence_loss(logits, teacher, target, *rest))
    assert count == 1
    wanted = divergence_loss_ref(logits.double(), teacher.double(), target, *rest)
    close_to_float64(got, wanted)


# The tables hold 80 and 800 weights.
@pytest.mark.parametrize(
    ("count", "wanted"), [(1, 1), (80, 1), (81, 1), (800, 1), (801, 2), (1700, 3)]
)
def test_launches_of_weights(emulator, count, wanted):
    given = [randn(2, 3, seed=i) for i in range(count)]
    given[-1] = randn(3, 1500)
    outputs, launched = launches(emulator, lambda: call.fake_quantize_weights(given, -127, 127, 0))
    assert launched == wanted
    same(outputs, reference.fake_quantize_weights_ref(given, -127, 127, 0))
    back = call.fake_quantize_weights_backward
    assert launches(emulator, lambda: back(given, given, -127, 127, 0))[1] == wanted


def test_weights_of_several_dtypes_take_a_launch_each(emulator):
    given = [randn(3, 4, dtype=DTYPES[i % 4], seed=i) for i in range(10)]
    outputs, launched = launches(emulator, lambda: call.fake_quantize_weights(given, -127, 127, 0))
    assert launched == 4
    same(outputs, reference.fake_quantize_weights_ref(given, -127, 127, 0))


def test_empty_tensors_launch_nothing(emulator):
    none = torch.zeros(0, 3)

    def everything():
        call.fake_quantize(none, *qparams_along(none, None), -8, 7, None, True)
        call.fake_quantize_backward(none, torch.zeros(0, dtype=torch.uint8))
        call.fake_quantize_observed(none, *state([]), 0, 255, None, 0.1, False, "exact", False)
        call.observe(none, *state([3]), 0, 255, 1, 0.1, False, False)
        call.fake_quantize_weights([none, torch.zeros(4, 0)], -8, 7, 0)
        call.fake_quantize_weights([], -8, 7, 0)

    assert launches(emulator, everything)[1] == 0


def test_captured_launches(emulator):
    """While a graph is being captured each launch has a counter of its own."""
    x = randn(30000)
    mine, wanted = state([]), state([])
    emulator.set_capturing(True)
    try:
        for _ in range(3):
            call.observe(x, *mine, 0, 255, None, 0.1, False, False)
            reference.observe_ref(x, *wanted, 0, 255, None, 0.1, False, False)
    finally:
        emulator.set_capturing(False)
    same(mine, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_blocks_and_threads_changes_a_bit(emulator, seed):
    emulator.set_seed(seed)
    x = randn(300, 40, 9, dtype=torch.bfloat16)
    for mode in ("exact", "delayed"):
        for ch_axis in (None, 1, 2):
            n = [] if ch_axis is None else [x.shape[ch_axis]]
            mine, wanted = state(n), state(n)
            rest = (0, 255, ch_axis, 0.1, True, mode, True)
            same(
                call.fake_quantize_observed(x, *mine, *rest),
                fake_quantize_observed(x, *wanted, *rest),
            )
            same(mine, wanted)
