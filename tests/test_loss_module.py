"""DivQATLoss as a module: drop-in for cross-entropy, warm-up, what it remembers."""

import math

import pytest
import torch
from testing import randn
from torch import nn
from torch.nn import functional as F

from divqat.nn import DivQATLoss

N, C = 12, 7
TARGET = torch.arange(N) % C


def logits(seed=0, dtype=torch.float64):
    return randn(N, C, seed=seed, dtype=dtype).mul_(2).requires_grad_()


def divergence(q_logits, p_logits, temperature=1.0, direction="student_teacher"):
    log_q = torch.log_softmax(q_logits / temperature, 1)
    log_p = torch.log_softmax(p_logits / temperature, 1)
    if direction == "teacher_student":
        log_q, log_p = log_p, log_q
    if direction == "js":
        log_m = torch.log((log_q.exp() + log_p.exp()) / 2)
        return sum(
            F.kl_div(log_m, log, log_target=True, reduction="batchmean") / 2
            for log in (log_q, log_p)
        )
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [True, False])
def test_without_weight_it_is_cross_entropy_bit_for_bit(options, dtype, teacher):
    loss = DivQATLoss(**options)
    assert isinstance(loss, nn.CrossEntropyLoss)
    a, b = logits(dtype=dtype), logits(dtype=dtype)
    value = loss(a, TARGET, logits(1, dtype).detach() if teacher else None)
    expected = nn.CrossEntropyLoss(**options)(b, TARGET)
    assert torch.equal(value, expected) and torch.equal(loss.ce, expected)
    value.backward()
    expected.backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student", "js"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_gradient(direction, temperature):
    loss = DivQATLoss(0.3, temperature=temperature, direction=direction)
    a, b, teacher = logits(), logits(), logits(1)
    value = loss(a, TARGET, teacher)
    d = divergence(b, teacher.detach(), temperature, direction)
    weight = float(torch.tensor(0.3))  # kept in float32
    expected = F.cross_entropy(b, TARGET) - weight * temperature**2 * d
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.divergence, d.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.ce, F.cross_entropy(b, TARGET).detach(), rtol=1e-10, atol=0)
    assert not loss.divergence.requires_grad and not loss.ce.requires_grad
    value.backward()
    expected.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert teacher.grad is None  # the teacher is frozen


def parts(loss):
    """The weight that a call used, from its value."""
    value = loss(logits(), TARGET, logits(1))
    return float((loss.ce - value.detach()) / loss.divergence)


def test_warm_up_is_linear_and_moves_with_step():
    loss = DivQATLoss(0.5, warmup_steps=4)
    weights = []
    for _ in range(6):
        weights += [parts(loss), parts(loss)]  # a call alone is no step
        loss.step()
    expected = [0.125, 0.125, 0.25, 0.25, 0.375, 0.375] + [0.5] * 6
    assert weights == pytest.approx(expected, rel=1e-6)


def test_set_weight_switches_on_and_off():
    loss = DivQATLoss(0.0)
    loss.set_weight(0.25)
    assert parts(loss) == pytest.approx(0.25, rel=1e-6)
    loss.set_weight(-0.25)
    assert parts(loss) == pytest.approx(-0.25, rel=1e-6)
    loss.set_weight(-0.0)
    assert torch.equal(loss(logits(), TARGET), F.cross_entropy(logits(), TARGET))


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_state_dict_keeps_weight_and_warm_up(tmp_path, weight):
    loss = DivQATLoss(weight, warmup_steps=4)
    loss.step()
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other = DivQATLoss(0.0, warmup_steps=4)  # a controller may have started at 0
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert parts(other) == pytest.approx(weight / 2, rel=1e-6)
    other.load_state_dict(DivQATLoss(0.0).state_dict())
    assert torch.equal(other(logits(), TARGET), F.cross_entropy(logits(), TARGET))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": math.nan}, "weight: wanted a number, got nan"),
        ({"direction": "up"}, "direction: wanted one of student_teacher"),
        ({"classes": "some"}, "classes: wanted one of all"),
        ({"warmup_steps": -1}, "warmup_steps: wanted >= 0, got -1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DivQATLoss(**options)


def test_a_weight_needs_a_teacher():
    with pytest.raises(ValueError, match="teacher_logits: wanted"):
        DivQATLoss(0.1)(logits(), TARGET)


def test_a_new_weight_does_not_recompile():
    loss, compiles = DivQATLoss(0.5, warmup_steps=3), []

    def count(graph, inputs):
        compiles.append(graph)
        return graph

    compiled = torch.compile(loss, backend=count, fullgraph=True)
    for weight in (0.5, 0.25, 0.75):
        loss.set_weight(weight)
        expected = loss(logits(), TARGET, logits(1).detach())
        actual = compiled(logits(), TARGET, logits(1).detach())
        assert torch.equal(actual, expected)
        loss.step()
    assert len(compiles) == 1


def test_the_other_classes_of_two_have_nothing_to_diverge_in():
    loss_fn, logits = DivQATLoss(weight=0.5, classes="non_label"), randn(4, 2)
    with pytest.raises(ValueError, match="classes: wanted all with two classes, got non_label"):
        loss_fn(logits, torch.tensor([0, 1, 1, 0]), randn(4, 2, seed=1))
    loss_fn.set_weight(0.0)
    loss_fn(logits, torch.tensor([0, 1, 1, 0]))
