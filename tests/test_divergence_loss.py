"""divergence_loss against float64 autograd through torch's own losses."""

import math

import pytest
import torch
from backends import INTERPRETED
from testing import DTYPES, TOLERANCE, randn, tensor
from torch.nn import functional as F

from divqat.ops import divergence_loss, divergence_loss_terms

pytestmark = pytest.mark.usefixtures("backend")

DIRECTIONS = ["student_teacher", "teacher_student", "js"]


def oracle(
    logits, teacher, target, weight, temperature, direction, classes, bound, guard, smoothing
):
    """The loss as autograd differentiates it, from F.cross_entropy and F.kl_div, row by row."""
    rows = []
    for z, t, y in zip(logits, teacher, target, strict=True):
        if y == -100:
            continue
        ce = F.cross_entropy(z[None], y[None], label_smoothing=smoothing)
        keep = torch.arange(len(z)) != y if classes == "non_label" else torch.ones(len(z)) > 0
        log_q = F.log_softmax(z[keep] / temperature, 0)
        log_p = F.log_softmax(t[keep] / temperature, 0)
        if direction == "student_teacher":
            d = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        elif direction == "teacher_student":
            d = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        else:
            log_m = ((log_q.exp() + log_p.exp()) / 2).log()
            d = (
                sum(F.kl_div(log_m, v, reduction="sum", log_target=True) for v in (log_q, log_p))
                / 2
            )
        if bound is not None:
            d = d.clamp(max=bound)
        if guard and z.argmax() != y:
            d = d * 0
        rows.append(ce - weight * temperature**2 * d)
    return torch.stack(rows).mean()


def inputs(n=9, c=6, dtype=torch.float64):
    logits = randn(n, c, dtype=dtype).mul_(2).requires_grad_()
    teacher = randn(n, c, dtype=dtype, seed=1).mul_(2)
    target = torch.arange(n) % c
    target[2] = -100
    return logits, teacher, target


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("classes", ["all", "non_label"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("weight", "bound", "guard", "smoothing"),
    [(0.7, None, False, 0.0), (0.7, 0.3, False, 0.1), (0.7, None, True, 0.1),
     (-0.7, None, False, 0.1), (-0.7, 0.3, True, 0.0)],
)  # fmt: skip
def test_value_and_gradient(direction, classes, temperature, weight, bound, guard, smoothing):
    logits, teacher, target = inputs()
    options = {"bound": bound, "guard": guard, "label_smoothing": smoothing}
    loss = divergence_loss(
        logits,
        teacher,
        target,
        weight=weight,
        temperature=temperature,
        direction=direction,
        classes=classes,
        **options,
    )
    # 0.7 is not a float32 number, which is what λ is kept in
    wanted = oracle(
        logits,
        teacher,
        target,
        float(torch.tensor(weight)),
        temperature,
        direction,
        classes,
        bound,
        guard,
        smoothing,
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
    (grad,) = torch.autograd.grad(loss, logits)
    (wanted_grad,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-13)
    assert not grad[2].any()


def test_by_hand():
    # q = (¾, ¼), p = (¼, ¾), label 0
    logits = tensor([[math.log(3.0), 0.0]])
    teacher = tensor([[0.0, math.log(3.0)]])
    loss, ce, d = divergence_loss_terms(logits, teacher, torch.tensor([0]), weight=0.5)
    kl = 0.75 * math.log(3) - 0.25 * math.log(3)
    assert ce.item() == pytest.approx(-math.log(0.75))
    assert d.item() == pytest.approx(kl)
    assert loss.item() == pytest.approx(-math.log(0.75) - 0.5 * kl, rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("classes", ["all", "non_label"])
def test_gradcheck_and_double_backward(direction, classes, backend):
    fast = backend == INTERPRETED  # in one direction, where each launch takes milliseconds
    logits, teacher, target = inputs(3, 4)

    def loss(z):
        return divergence_loss(
            z, teacher, target, weight=0.5, temperature=2.0, direction=direction,
            classes=classes, label_smoothing=0.1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (logits,), fast_mode=fast)
    assert torch.autograd.gradgradcheck(loss, (logits,), fast_mode=fast)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dtypes_compute_in_float32_inside(dtype, direction):
    logits, teacher, target = inputs(dtype=dtype)
    loss = divergence_loss(
        logits, teacher, target, weight=0.1, temperature=4.0, direction=direction
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    double = logits.detach().double().requires_grad_()
    wanted = divergence_loss(
        double, teacher.double(), target, weight=0.1, temperature=4.0, direction=direction
    )
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    loss.backward()
    wanted.backward()
    assert logits.grad.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(logits.grad.double(), double.grad, rtol=tolerance, atol=1e-6)


def test_loss_scaling_saves_the_gradient_of_float16():
    logits, teacher = 4 * randn(128, 100, seed=1), 4 * randn(128, 100, seed=2)
    logits, teacher = logits.half().requires_grad_(), teacher.half()
    double = logits.detach().double().requires_grad_()
    target = double.argmax(1)
    scale = 65536.0
    (scale * divergence_loss(logits, teacher, target, weight=0.1)).backward()
    (scale * divergence_loss(double, teacher.double(), target, weight=0.1)).backward()
    assert logits.grad.dtype == torch.float16
    torch.testing.assert_close(logits.grad.double(), double.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weight_zero_is_cross_entropy_bit_for_bit(dtype, smoothing):
    logits, teacher, target = inputs(64, 10, dtype)
    wanted = F.cross_entropy(logits, target, label_smoothing=smoothing)
    (wanted_grad,) = torch.autograd.grad(wanted, logits)
    loss = divergence_loss(logits, teacher, target, weight=0.0, label_smoothing=smoothing)
    assert torch.equal(loss, wanted)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], wanted_grad)
    # through the kernel, too: λ may be a tensor that happens to be 0 (during a warm-up, say)
    steered = divergence_loss(
        logits, teacher, target, weight=torch.zeros(()), label_smoothing=smoothing
    )
    (grad,) = torch.autograd.grad(steered, logits)
    torch.testing.assert_close(steered, wanted, rtol=1e-6, atol=0)
    # at the label softmax and target nearly cancel
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-8)


def test_infinite_logits():
    logits = tensor([[0.0, -math.inf, 1.0], [2.0, 1.0, 0.0]]).requires_grad_()
    teacher = tensor([[1.0, 0.0, 0.5], [1.0, -math.inf, 0.0]])
    target = torch.tensor([2, 0])
    # KL(q‖p) needs p > 0 where q > 0: infinite in the second row, finite in the first
    first = divergence_loss(logits[:1], teacher[:1], target[:1], weight=0.3)
    assert first.isfinite() and torch.autograd.grad(first, logits)[0].isfinite().all()
    assert divergence_loss(logits, teacher, target, weight=0.3).item() == -math.inf
    # a bound, or λ = 0, keeps it finite
    bounded = divergence_loss(logits, teacher, target, weight=0.3, bound=1.0)
    assert bounded.isfinite() and torch.autograd.grad(bounded, logits)[0].isfinite().all()
    off = divergence_loss(logits, teacher, target, weight=torch.zeros(()))
    assert off.isfinite() and torch.autograd.grad(off, logits)[0].isfinite().all()
    # KL(p‖q) is infinite where q = 0 < p; JS is never more than log 2
    other = divergence_loss(
        logits[:1], teacher[:1], target[:1], weight=1.0, direction="teacher_student"
    )
    assert other.item() == -math.inf
    js = divergence_loss_terms(logits, teacher, target, weight=1.0, direction="js")[2]
    assert 0 < js <= math.log(2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classes", ["all", "non_label"])
def test_nan_does_not_become_a_number(direction, bad, classes):
    logits, teacher, target = inputs(dtype=torch.float32)
    teacher[1, 3] = bad
    options = {"weight": 0.3, "direction": direction, "classes": classes}
    loss, ce, divergence = divergence_loss_terms(logits, teacher, target, **options)
    assert loss.isnan() and divergence.isnan() and ce.isfinite()
    (grad,) = torch.autograd.grad(loss, logits)
    others = torch.arange(6) != target[1] if classes == "non_label" else torch.arange(6) >= 0
    assert grad[1, others].isnan().all() and grad[3:].isfinite().all()
    bounded = divergence_loss(logits, teacher, target, bound=0.5, **options)
    assert bounded.isnan()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_without_other_classes_is_nan(direction):
    logits = tensor([[0.0, -math.inf, -math.inf], [2.0, 1.0, 0.0]]).requires_grad_()
    teacher, target = tensor([[1.0, 0.0, 0.5], [1.0, -1.0, 0.0]]), torch.tensor([0, 1])
    loss = divergence_loss(
        logits, teacher, target, weight=0.3, direction=direction, classes="non_label"
    )
    assert loss.isnan() and torch.autograd.grad(loss, logits)[0][0, 1:].isnan().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits_stay_finite(direction):
    logits = tensor([[300.0, -300.0, 0.0], [-1e4, 1e4, 0.0]]).requires_grad_()
    teacher = tensor([[-300.0, 300.0, 0.0], [1e4, -1e4, 0.0]])
    loss = divergence_loss(logits, teacher, torch.tensor([0, 1]), weight=0.1, direction=direction)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_shift_invariance_and_the_stationary_point():
    logits, teacher, target = inputs()
    args = {"weight": 0.5, "temperature": 3.0}
    a = divergence_loss(logits, teacher, target, **args)
    b = divergence_loss(logits + 7, teacher - 3, target, **args)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    # q = p: D = 0 with gradient 0, so L is plain cross-entropy there
    at_teacher = teacher.clone().requires_grad_()
    loss, _, d = divergence_loss_terms(at_teacher, teacher, target, **args)
    assert d.abs() < 1e-15
    (grad,) = torch.autograd.grad(loss, at_teacher)
    (wanted,) = torch.autograd.grad(F.cross_entropy(at_teacher, target), at_teacher)
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


def test_non_label_leaves_the_label_probability_alone():
    logits, teacher, target = inputs()
    args = {"temperature": 2.0, "classes": "non_label"}
    (grad,) = torch.autograd.grad(
        divergence_loss(logits, teacher, target, weight=0.5, **args), logits
    )
    (of_ce,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    from_divergence = (grad - of_ce)[target >= 0]
    label = target[target >= 0]
    assert not from_divergence.gather(1, label[:, None]).any()
    torch.testing.assert_close(from_divergence.sum(1), torch.zeros(len(label)).double())
    # two classes leave a tail of one: nothing to diverge
    _, _, d = divergence_loss_terms(logits[:, :2], teacher[:, :2], target % 2, weight=1.0, **args)
    assert d.item() == 0.0


def test_one_class_no_samples_all_ignored():
    one = torch.zeros(3, 1, requires_grad=True)
    loss = divergence_loss(one, torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), weight=0.5)
    assert loss.item() == 0.0
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = divergence_loss(empty, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), weight=0.5)
    assert loss.isnan() and F.cross_entropy(empty, torch.zeros(0, dtype=torch.int64)).isnan()
    ignored = torch.full((3,), -100)
    loss = divergence_loss(torch.randn(3, 4), torch.randn(3, 4), ignored, weight=0.5)
    assert loss.isnan()


def test_teacher_and_terms_have_no_gradient():
    logits, teacher, target = inputs()
    teacher.requires_grad_()
    loss, ce, d = divergence_loss_terms(logits, teacher, target, weight=0.5)
    assert not ce.requires_grad and not d.requires_grad
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(loss, ce - 0.5 * d)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits: wanted \[N, C\], got \[3\]"),
        ({"teacher_logits": torch.zeros(2, 5)}, ValueError, "teacher_logits: wanted"),
        ({"target": torch.zeros(2)}, ValueError, r"target: wanted int64 \[2\]"),
        ({"direction": "kl"}, ValueError, "direction: wanted one of"),
        ({"classes": "top"}, ValueError, "classes: wanted one of"),
        ({"temperature": 0.0}, ValueError, "temperature: wanted > 0, got 0.0"),
        ({"bound": -1.0}, ValueError, "bound: wanted > 0 or None"),
        ({"weight": float("nan")}, ValueError, "weight: wanted a number, got nan"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing: wanted a value in"),
        ({"logits": torch.zeros(2, 4).int()}, TypeError, "logits: wanted float32"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {
        "logits": torch.zeros(2, 4),
        "teacher_logits": torch.zeros(2, 4),
        "target": torch.zeros(2, dtype=torch.int64),
        "weight": 0.1,
    }
    with pytest.raises(error, match=words):
        divergence_loss(**(arguments | change))
