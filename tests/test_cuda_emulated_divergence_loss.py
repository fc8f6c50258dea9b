"""The CUDA kernels of divergence_loss, run by the emulator on CPU tensors."""

import math

import pytest
import torch
from backends import launches
from cuda_emulator.build import why_not
from testing import DTYPES, TOLERANCE, bits, randn, tensor
from torch.nn import functional as F

from divqat import ops
from divqat.ops.reference_loss import divergence_loss_ref

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module", autouse=True)
def emulator(emulated_kernels):
    return emulated_kernels


DIRECTIONS = ["student_teacher", "teacher_student", "js"]


def loss_inputs(n, c, dtype=torch.float32, seed=0):
    logits = randn(n, c, dtype=dtype, seed=seed).mul_(2)
    teacher = randn(n, c, dtype=dtype, seed=seed + 1).mul_(2)
    target = torch.arange(n) * 7 % c
    if n > 2:
        target[2] = -100
    return logits, teacher, target


def options(
    direction="student_teacher", weight=0.5, temperature=1.0, classes="all", bound=None,
    guard=False, smoothing=0.0, ignore_index=-100,
):  # fmt: skip
    """The op's arguments after target."""
    return (
        torch.tensor(weight), temperature, direction, classes, bound, guard, smoothing, ignore_index
    )  # fmt: skip


def check_loss(logits, teacher, target, *args):
    outputs = torch.ops.divqat.divergence_loss(logits, teacher, target, *args)
    wanted = divergence_loss_ref(logits.double(), teacher.double(), target, *args)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[dtype]
    for value, reference in zip(outputs[:3], wanted[:3], strict=True):
        assert value.dtype == dtype and value.shape == ()
        torch.testing.assert_close(
            value.double(), reference, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    grad = outputs[3]
    assert grad.dtype == logits.dtype and grad.stride() == torch.empty_like(logits).stride()
    # float32's rounding is relative to a sample's share, one more rounding to the value itself
    share = 1 / max(int((target != args[-1]).sum()), 1)
    torch.testing.assert_close(
        grad.double(), wanted[3], rtol=TOLERANCE[logits.dtype], atol=tolerance * share,
        equal_nan=True,
    )  # fmt: skip
    again = torch.ops.divqat.divergence_loss(logits, teacher, target, *args)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outputs, again, strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
# The widths at which another kernel, or another share of a thread, takes over
@pytest.mark.parametrize(
    "c", [1, 2, 3, 10, 57, 58, 59, 64, 65, 100, 250, 256, 257, 1000, 2041, 2048]
)
def test_loss_widths(c, dtype, direction):
    check_loss(*loss_inputs(5, c, dtype), *options(direction, temperature=2.0, smoothing=0.1))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("c", [2049, 4100, 10007])
def test_loss_rows_beyond_registers(c, direction):
    check_loss(*loss_inputs(3, c), *options(direction, classes="non_label", guard=True))
    check_loss(*loss_inputs(3, c, torch.bfloat16), *options(direction, temperature=4.0))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("classes", ["all", "non_label"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("bound", "guard", "smoothing"),
    [(None, False, 0.0), (0.3, False, 0.1), (None, True, 0.1), (0.5, True, 0.0)],
)
@pytest.mark.parametrize(("n", "c"), [(90, 10), (30, 100), (9, 300), (4, 2)])
def test_loss_options(n, c, direction, classes, temperature, bound, guard, smoothing):
    chosen = options(direction, 0.7, temperature, classes, bound, guard, smoothing)
    logits, teacher, target = loss_inputs(n, c)
    # half of the samples right, so that the guard lets some through
    logits[torch.arange(0, n, 2), target.clamp(min=0)[::2]] += 9
    check_loss(logits, teacher, target, *chosen)
    if (n, c) == (90, 10):
        check_loss(logits.double(), teacher.double(), target, *chosen)


@pytest.mark.parametrize("c", [3, 37, 1000])
def test_loss_against_torch(c):
    logits, teacher, target = loss_inputs(8, c, torch.float64)
    logits.requires_grad_()
    q, p = (F.log_softmax(v / 3, 1) for v in (logits, teacher))
    kept = target != -100
    kl = F.kl_div(p[kept], q[kept], reduction="batchmean", log_target=True)
    ce = F.cross_entropy(logits, target, label_smoothing=0.1)
    wanted = ce - 0.5 * 9 * kl
    outputs = torch.ops.divqat.divergence_loss(
        logits.detach(), teacher, target, *options(temperature=3.0, smoothing=0.1)
    )
    for value, reference in zip(outputs[:3], (wanted, ce, kl), strict=True):
        torch.testing.assert_close(value, reference.detach(), rtol=1e-12, atol=1e-13)
    (grad,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(outputs[3], grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("c", [4, 90, 301, 2500])
@pytest.mark.parametrize("classes", ["all", "non_label"])
@pytest.mark.parametrize(("weight", "bound"), [(0.3, None), (0.3, 1.0), (0.0, None)])
def test_loss_special_values(c, direction, classes, weight, bound):
    """Each row alone, so that none hides in another's infinity; and all of them together."""
    inf, nan = math.inf, math.nan
    logits, teacher, target = loss_inputs(9, c)
    target[2] = 1
    logits[0, 1], teacher[1, 0], logits[2, 1] = -inf, -inf, -inf
    logits[3, 0], teacher[4, 2], logits[5] = nan, nan, -inf
    logits[6], teacher[6] = logits[6].sign() * 80, logits[6].sign() * -80
    logits[7, 2], teacher[8, 1] = inf, 300.0
    chosen = options(direction, weight, 1.0, classes, bound, guard=False)
    for row in [*([i] for i in range(9)), list(range(9))]:
        rows = (logits[row], teacher[row], target[row])
        outputs = torch.ops.divqat.divergence_loss(*rows, *chosen)
        wanted = divergence_loss_ref(*rows, *chosen)
        for value, reference in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("c", [4, 90, 301, 2500])
def test_loss_of_extreme_logits(c, direction):
    logits, teacher, target = loss_inputs(6, c)
    logits, teacher = logits.sign() * 1e4, teacher.sign() * 1e4
    outputs = torch.ops.divqat.divergence_loss(logits, teacher, target, *options(direction))
    wanted = divergence_loss_ref(logits.double(), teacher.double(), target, *options(direction))
    for value, reference in zip(outputs[:3], wanted[:3], strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    # log q − log p − D cancels to the last bits of 10^4
    torch.testing.assert_close(outputs[3].double(), wanted[3], rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("c", [5, 70, 300, 2500])
def test_loss_guard_takes_the_first_of_equals(c):
    logits = torch.zeros(4, c)
    logits[1, 2] = logits[1, 1] = 5.0
    logits[2] = -math.inf
    logits[2, 0] = 0.0
    logits[3, 3] = math.nan
    target = torch.tensor([0, 2, 0, 3])
    teacher = randn(4, c)
    # argmax is 0, 1, 0, 3: the second sample is wrong
    for row, counts in enumerate([True, False, True, True]):
        args = (logits[row : row + 1], teacher[row : row + 1], target[row : row + 1])
        guarded = torch.ops.divqat.divergence_loss(*args, *options("teacher_student", guard=True))
        plain = torch.ops.divqat.divergence_loss(*args, *options("teacher_student"))
        assert torch.equal(bits(guarded[2]), bits(plain[2] if counts else torch.zeros(())))


def test_loss_without_valid_targets():
    logits, teacher, _ = loss_inputs(3, 4)
    loss, _, _, grad = torch.ops.divqat.divergence_loss(
        logits, teacher, torch.full((3,), -100), *options()
    )
    assert loss.isnan() and not grad.any()
    none = torch.zeros(0, 4)
    outputs = torch.ops.divqat.divergence_loss(none, none, torch.zeros(0).long(), *options())
    assert outputs[0].isnan() and outputs[3].shape == (0, 4)


@pytest.mark.parametrize("c", [1, 2])
def test_loss_with_an_empty_tail(c):
    """One class has no others, two leave one: nothing to diverge."""
    logits, teacher, _ = loss_inputs(4, c)
    args = (logits, teacher, torch.zeros(4).long(), *options(classes="non_label"))
    assert torch.ops.divqat.divergence_loss(*args)[2] == 0
    check_loss(*args)


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
@pytest.mark.parametrize("c", [5, 100, 300])
def test_loss_of_an_unknown_class_is_nan(bad, c):
    logits, teacher, target = loss_inputs(6, c)
    target[4] = c if bad == 5 else bad
    loss, _, _, grad = torch.ops.divqat.divergence_loss(logits, teacher, target, *options())
    assert loss.isnan() and grad[4].isnan().all()
    rest = [0, 1, 2, 3, 5]
    target[4] = 0
    wanted = torch.ops.divqat.divergence_loss(logits, teacher, target, *options())[3]
    assert torch.equal(grad[rest], wanted[rest])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "c"), [(8192, 2), (8193, 2), (20001, 3), (9001, 33)])
def test_loss_counts_many_targets(emulator, n, c):
    """Beyond 8192 targets the blocks count them together, in the same launch."""
    logits, teacher, target = loss_inputs(n, c)
    target[::3] = -7
    args = (logits, teacher, target, *options(ignore_index=-7))
    target[2] = 0
    _, count = launches(emulator, lambda: torch.ops.divqat.divergence_loss(*args))
    assert count == 1
    check_loss(*args)


def test_loss_layouts_and_alignment():
    logits, teacher, target = loss_inputs(7, 33)
    check_loss(logits.t().contiguous().t(), teacher, target, *options())
    check_loss(torch.stack([logits, logits], 1)[:, 0], teacher, target, *options())
    shifted = torch.empty(7 * 32 + 1)[1:].view(7, 32).copy_(logits[:, :32])
    check_loss(shifted, teacher[:, :32], target % 32, *options())


@pytest.mark.parametrize("c", [10, 77, 1001, 3003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_writes_inside_its_rows_only(c, dtype):
    """A gradient of NaN rows beside finite ones shows a store that goes astray."""
    logits, teacher, target = loss_inputs(6, c, dtype)
    target[2] = 0
    clean = torch.ops.divqat.divergence_loss(logits, teacher, target, *options())[3]
    logits[[1, 4]] = math.nan
    grad = torch.ops.divqat.divergence_loss(logits, teacher, target, *options())[3]
    assert grad[[1, 4]].isnan().all()
    assert torch.equal(bits(grad[[0, 2, 3, 5]]), bits(clean[[0, 2, 3, 5]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 4096, 20001])
def test_loss_backward_scales_in_place(emulator, n, dtype):
    backward = torch.ops.divqat.divergence_loss_backward
    grad = randn(n, dtype=dtype)
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    for factor in (1.0, 0.3, 1024.0, math.nan):
        scaled, by = grad.clone(), tensor(factor, scalar)
        _, count = launches(emulator, lambda scaled=scaled, by=by: backward(scaled, by))
        assert count == 1
        torch.testing.assert_close(scaled, grad * by, rtol=0, atol=0, equal_nan=True)
    shifted = torch.empty(n + 1, dtype=dtype)[1:].copy_(grad)
    backward(shifted, tensor(0.3, scalar))
    assert torch.equal(shifted, grad * tensor(0.3, scalar))


def test_captured_launches_give_the_same(emulator):
    """A launch in a graph has a counter of its own."""
    args = (*loss_inputs(300, 10), *options())
    eager = torch.ops.divqat.divergence_loss(*args)
    emulator.set_capturing(True)
    try:
        captured = torch.ops.divqat.divergence_loss(*args)
    finally:
        emulator.set_capturing(False)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(eager, captured, strict=True))


def test_loss_launches(emulator):
    logits, teacher, target = loss_inputs(50, 100)
    logits.requires_grad_()
    loss, count = launches(
        emulator,
        lambda: ops.divergence_loss(logits, teacher, target, weight=torch.tensor(0.5)),
    )
    assert count == 1
    _, count = launches(emulator, loss.backward)
    assert count == 1


def test_loss_bad_arguments_are_named():
    logits, teacher, target = loss_inputs(4, 5)
    op = torch.ops.divqat.divergence_loss
    with pytest.raises(ValueError, match=r"target: wanted \[4\], got \[3\]"):
        op(logits, teacher, target[:3], *options())
    with pytest.raises(ValueError, match="direction: wanted one of"):
        op(logits, teacher, target, *options("kl"))
    with pytest.raises(ValueError, match="teacher_logits: wanted"):
        op(logits, teacher[:, :4], target, *options())
    with pytest.raises(TypeError, match="grad_output: wanted Float, got Double"):
        torch.ops.divqat.divergence_loss_backward(logits, tensor(1.0, torch.float64))
