"""The compiled kernels against the references they replace, and the module that brings them."""

import os
import subprocess
import sys
from pathlib import Path

import backends
import pytest
import torch
from testing import DTYPES, TOLERANCE, randn, same, tensor

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
    yield large.to(memory_format=torch.channels_last)
    yield large.permute(2, 0, 3, 1)
    yield large[:, ::2, 1:, ::3]
    yield large[:, :1].expand(-1, 4, -1, -1)
    spoilt = large.clone()
    spoilt.view(-1)[::1013] = NAN
    spoilt.view(-1)[5::2017] = INF
    spoilt.view(-1)[6::2017] = -INF
    yield spoilt
    # the address of a slice is not that of a register
    yield randn(1000, dtype=dtype).mul_(4)[3:]


def qparams(x, ch_axis):
    n = 1 if ch_axis is None else x.shape[ch_axis]
    scale = torch.linspace(0.03, 0.11, n)
    zero_point = (torch.arange(n, dtype=torch.int32) * 7) % 11 - 5
    return (scale[0], zero_point[0]) if ch_axis is None else (scale, zero_point)


def axes(x):
    return [None, *range(x.dim())]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_bit_equal(isa, dtype):
    for x in awkward(dtype):
        for ch_axis in axes(x):
            for propagate in (True, False):
                args = (x, *qparams(x, ch_axis), -60, 61, ch_axis, propagate)
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
            scale, _ = qparams(x, ch_axis)
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
    x = randn(9, 70, 33, 31, dtype=dtype)
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
    exact = dtype == torch.float64
    for n, c in ((0, 5), (1, 1), (3, 2), (40, 10), (7, 15), (7, 16), (7, 17), (5, 1003)):
        logits, teacher = randn(n, c, dtype=dtype).mul_(3), randn(n, c, dtype=dtype, seed=1).mul_(3)
        target = torch.arange(n) % c
        target[1::5] = -100
        if c > 4 and n:
            logits[0, 1] = teacher[0, 1] = -INF  # 0 · anything is 0
            logits[n // 2] *= 1000
        for options in (
            (1.0, direction, "all", None, False, 0.0),
            (4.0, direction, "all", 0.3, True, 0.1),
            (2.0, direction, "non_label", None, True, 0.0),
        ):
            if c == 1 and options[2] == "non_label":
                continue
            args = (target, tensor(0.2), *options, -100)
            with backends.serving(isa):
                native = call.divergence_loss(logits, teacher, *args)
            with ops.backend("torch"):
                wanted = call.divergence_loss(logits.double(), teacher.double(), *args)
            rtol, atol = (1e-11, 1e-11) if exact else (2e-5, 2e-6)
            for a, b in zip(native[:3], wanted[:3], strict=True):
                torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, equal_nan=True)
            rtol = max(rtol, TOLERANCE[dtype])
            torch.testing.assert_close(
                native[3].double(), wanted[3], rtol=rtol, atol=atol, equal_nan=True
            )


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


def test_buffers_that_are_not_contiguous_are_written_back():
    x = randn(4, 3, 5)
    table = torch.full((3, 2), INF)
    scale, zero_point = torch.ones(6)[::2], torch.zeros(6, dtype=torch.int32)[::2]
    call.observe(
        x, table[:, 0], table[:, 1].neg_(), scale, zero_point, 0, 255, 1, 0.1, False, False
    )
    assert torch.equal(table[:, 0], x.amin((0, 2))) and torch.equal(table[:, 1], x.amax((0, 2)))
    assert (scale < 1).all() and (zero_point > 0).all()


@pytest.mark.parametrize(
    ("name", "args", "error", "words"),
    [
        ("fake_quantize", {"scale": torch.ones(2)}, ValueError, r"scale: wanted 1 value"),
        ("fake_quantize", {"scale": torch.ones(()).double()}, TypeError, "scale: wanted Float"),
        ("fake_quantize", {"zero_point": torch.zeros(())}, TypeError, "zero_point: wanted Int"),
        ("fake_quantize", {"x": torch.ones(3).int()}, TypeError, "x: wanted float32"),
        ("fake_quantize", {"ch_axis": 2}, IndexError, "ch_axis: wanted an axis of x with 1 dims"),
        ("fake_quantize", {"quant_max": -128}, ValueError, "quant_min < quant_max"),
    ],
)
def test_the_kernels_check_what_they_are_given(name, args, error, words):
    given = {
        "x": torch.zeros(3),
        "scale": torch.ones(()),
        "zero_point": torch.zeros((), dtype=torch.int32),
        "quant_min": -128,
        "quant_max": 127,
        "ch_axis": None,
        "propagate_nan": True,
    } | args
    with pytest.raises(error, match=words):
        getattr(call, name)(*given.values())


@pytest.mark.parametrize(
    ("grad", "mask", "error", "words"),
    [
        (torch.zeros(9), torch.zeros(1, dtype=torch.uint8), ValueError, "mask: wanted 2"),
        (torch.zeros(9), torch.zeros(2), TypeError, "mask: wanted uint8"),
        (
            torch.zeros(9, 4)[:, ::2],
            torch.zeros(3, dtype=torch.uint8),
            ValueError,
            "grad_y: wanted",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(grad, mask, error, words):
    with pytest.raises(error, match=words):
        call.fake_quantize_backward(grad, mask)


def test_backend_switches_and_says_what_is_wrong():
    assert ops.backends()["fake_quantize"]["cpu"] == ("native", "")
    with ops.backend("torch"):
        name, reason = ops.backends()["fake_quantize"]["cpu"]
        assert name == "torch" and reason == "the native kernels are switched off"
        with ops.backend("native"):
            assert ops.backends()["observe"]["cpu"] == ("native", "")
        assert ops.backends()["observe"]["cpu"][0] == "torch"
    assert ops.backends()["observe"]["cpu"] == ("native", "")
    with pytest.raises(ValueError, match="backend: wanted one of native, torch, got 'cuda'"):
        ops.backend("cuda").__enter__()


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [("torch", 0, "torch"), ("native", 0, "native"), ("cuda", 1, "backend: wanted one of")],
)
def test_the_environment_chooses_the_backend(value, code, said):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from divqat import ops; print(ops.backends()['observe']['cpu'][0])",
        ],
        env=os.environ | {"DIVQAT_BACKEND": value},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == code and said in done.stdout + done.stderr


def test_every_op_has_a_native_cpu_kernel():
    assert {devices["cpu"] for devices in ops.backends().values()} == {("native", "")}


def test_instruction_sets():
    assert SETS[-1] == "portable" and extension.instruction_set() in SETS
    with pytest.raises(ValueError, match=r"name: wanted one of .*portable, got mmx"):
        extension.use_instruction_set("mmx")
    with pytest.raises(ValueError, match="this build has no kernels for tpu"):
        extension.Registration("tpu")


@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_the_plan_of_the_weights_covers_every_row_once(elements):
    shapes = [(64, 147), (10, 1), (1, 5000), (0, 3), (7, 0), (513, 33)]
    rows = [(i, r) for i, (n, columns) in enumerate(shapes) if columns for r in range(n)]
    tasks = extension.WeightsPlan(shapes, elements).tasks
    assert [(t.weight, r) for t in tasks for r in range(t.row_begin, t.row_end)] == rows
    for task in tasks:
        columns = shapes[task.weight][1]
        assert task.row_end - task.row_begin == 1 or (
            (task.row_end - task.row_begin) * columns <= elements
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_openmp_runtime():
    """A second one would bring threads that fight with torch's."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    here = {line.split()[-1] for line in maps if "divqat/_C" in line}
    assert here
    # scikit-learn and others may have loaded their own copy: ours must have come with torch
    assert any("/torch/" in library or "/conda" in library for library in libraries)


def test_the_kernels_use_torchs_threads():
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert extension.threads() == n
    finally:
        torch.set_num_threads(threads)


def test_benchmark_hooks_do_the_work():
    x, y = randn(1001).mul_(3), torch.zeros(1001)
    mask = torch.zeros(126, dtype=torch.uint8)
    extension.fake_quantize_cpu(
        x.data_ptr(), y.data_ptr(), mask.data_ptr(), 1001, 0.05, 3.0, -20.0, 20.0
    )
    same([y, mask], call.fake_quantize(x, tensor(0.05), torch.tensor(3).int(), -20, 20, None, True))
    extension.copy_cpu(y.data_ptr(), x.data_ptr(), 4 * 1001)
    assert torch.equal(x, y)
