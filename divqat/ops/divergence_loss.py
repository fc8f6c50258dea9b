"""Cross-entropy minus a divergence from a frozen teacher: the loss of DivQAT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from divqat.ops._autograd import batched
from divqat.ops._check import (
    FLOAT32,
    check_choice,
    check_device,
    check_flags,
    check_float,
    check_integer,
    check_number,
    check_tensor,
    check_untransformed,
    readable,
)
from divqat.ops._library import op, register
from divqat.ops.reference_loss import divergence_loss_backward_ref, divergence_loss_ref

DIRECTIONS = ("student_teacher", "teacher_student", "js")
CLASSES = ("all", "non_label")


def divergence_loss(
    logits: Tensor,  # [N, C]
    teacher_logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    *,
    weight: float | Tensor,
    temperature: float = 1.0,
    direction: str = "student_teacher",
    classes: str = "all",
    bound: float | None = None,
    guard: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """L = CE(logits, target) − weight · T² · D, the mean over samples ("batchmean").

    The student remains accurate (CE) but moves away from the frozen full-precision teacher (D), so
    that its answers mislead a clone that is trained on them (DivQAT, arXiv 2512.23948). The factor
    T² keeps the size of the gradient as T changes (Hinton et al. 2015, §2). With a negative weight
    the student moves towards the teacher, which is knowledge distillation (ibid.). D is measured
    between the softmaxes at temperature T; CE is taken at temperature 1.

    Value and gradient come from one pass over the logits; a second derivative is available.

    Args:
        logits: the student's, [N, C], float32, float64, bfloat16 or float16 (computed in float32,
            so that loss scaling works).
        teacher_logits: the teacher's, same shape and dtype; a constant.
        target: int64 [N], class indices or ``ignore_index``. Any other value is an IndexError if it
            can be read without a host sync (on the CPU); otherwise the loss and that row of the
            gradient are NaN.
        weight: λ, a constant; a float, or a float32 tensor [] on the same device, which can change
            without recompilation. With the float 0 the loss is ``F.cross_entropy`` itself.
        temperature: T, from 1e-18 to 1e18, so that 1 / T and T² are finite in float32.
        direction: D = ``"student_teacher"`` KL(q‖p), at most max log 1/p; ``"teacher_student"``
            KL(p‖q), unbounded; ``"js"`` Jensen–Shannon, at most log 2. In nats.
        classes: ``"all"``, or ``"non_label"`` for the renormalized distributions over the other
            classes, which do not affect the label's probability.
        bound: κ > 0 for min(D, κ) per sample; a sample at the bound has no gradient from D.
        guard: a sample whose largest logit is not its label contributes CE only.
        label_smoothing: ε of CE, in [0, 1).
        ignore_index: samples with this target contribute nothing and are not counted.

    Returns:
        The loss, [], float32 for half-precision logits, else the logits' dtype. NaN if no sample
        counts, like ``F.cross_entropy``.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or option.
        IndexError: a target that is not a class.
        NotImplementedError: inside ``torch.func``.
    """
    return divergence_loss_terms(
        logits,
        teacher_logits,
        target,
        weight=weight,
        temperature=temperature,
        direction=direction,
        classes=classes,
        bound=bound,
        guard=guard,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )[0]


def divergence_loss_terms(
    logits: Tensor,  # [N, C]
    teacher_logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    *,
    weight: float | Tensor,
    temperature: float = 1.0,
    direction: str = "student_teacher",
    classes: str = "all",
    bound: float | None = None,
    guard: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`divergence_loss` and its two terms, for logging.

    Returns:
        The loss, the mean CE and the mean D (after bound and guard, before weight and T²), each
        []; only the loss has a gradient. With a float weight of 0, D is not computed and 0.
    """
    _check_tensors(logits, teacher_logits, target, ignore_index)
    _check_options(temperature, direction, classes, bound, guard, label_smoothing)
    if isinstance(weight, Tensor):
        if weight.dtype != torch.float32 or list(weight.shape) not in ([], [1]):
            raise ValueError(f"weight: wanted float32 [], got {weight.dtype} {list(weight.shape)}")
        check_device("weight", weight, logits.device, "logits")
        weight = weight.detach().reshape(())
    else:
        check_number("weight", weight)
        if not abs(weight) <= FLOAT32.max:
            raise ValueError(f"weight: wanted a number, got {weight}")
        if weight == 0:
            loss = F.cross_entropy(
                logits.float() if logits.dtype.itemsize == 2 else logits,
                target,
                label_smoothing=label_smoothing,
                ignore_index=ignore_index,
            )
            return loss, loss.detach(), torch.zeros_like(loss.detach())
        weight = torch.full((), weight, dtype=torch.float32, device=logits.device)
    if logits.dtype == torch.float16:
        # The gradient is computed in the forward, before a GradScaler's factor reaches it: in
        # float16 most of it would underflow to 0.
        logits, teacher_logits = logits.float(), teacher_logits.float()
    check_untransformed("divergence_loss")
    return DivergenceLoss.apply(
        logits,
        teacher_logits.detach(),
        target,
        weight,
        float(temperature),
        direction,
        classes,
        bound,
        guard,
        float(label_smoothing),
        ignore_index,
    )


def _check_tensors(
    logits: Tensor, teacher_logits: Tensor, target: Tensor, ignore_index: int
) -> None:
    check_float("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: wanted [N, C], got {list(logits.shape)}")
    check_tensor("teacher_logits", teacher_logits)
    if teacher_logits.shape != logits.shape or teacher_logits.dtype != logits.dtype:
        raise ValueError(
            f"teacher_logits: wanted {list(logits.shape)} {logits.dtype} like logits, "
            f"got {list(teacher_logits.shape)} {teacher_logits.dtype}"
        )
    check_device("teacher_logits", teacher_logits, logits.device, "logits")
    check_tensor("target", target)
    if target.dtype != torch.int64 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"target: wanted int64 [{logits.shape[0]}], got {target.dtype} {list(target.shape)}"
        )
    check_device("target", target, logits.device, "logits")
    check_integer("ignore_index", ignore_index)
    _check_classes(target, logits.shape[1], ignore_index)


def _check_options(
    temperature: float,
    direction: str,
    classes: str,
    bound: float | None,
    guard: bool,
    label_smoothing: float,
) -> None:
    check_choice("direction", direction, DIRECTIONS)
    check_choice("classes", classes, CLASSES)
    check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature: wanted > 0, got {temperature}")
    if not 1e-18 <= temperature <= 1e18:
        raise ValueError(f"temperature: wanted 1e-18 to 1e18, got {temperature}")
    if bound is not None:
        check_number("bound", bound)
        if not bound > 0:
            raise ValueError(f"bound: wanted > 0 or None, got {bound}")
    check_flags(guard=guard)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: wanted a value in [0, 1), got {label_smoothing}")


def _check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Check, if the targets can be read, that they are classes or ``ignore_index``."""
    if target.numel() == 0 or not readable(target):
        return
    smallest, largest = target.aminmax()
    if smallest.item() >= 0 and largest.item() < classes:
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise IndexError(
            f"target: wanted a class in [0, {classes}) or ignore_index {ignore_index}, "
            f"got {int(target[at])} at {at}"
        )


class DivergenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, ce, divergence, ctx.grad = op("divergence_loss")(logits, *args)
        teacher_logits, target, weight, *ctx.options = args
        ctx.save_for_backward(logits, teacher_logits, target, weight)
        ctx.mark_non_differentiable(ce, divergence)
        ctx.set_materialize_grads(False)
        return loss, ce, divergence

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 11
        inputs = (*ctx.saved_tensors, *ctx.options)
        if torch.is_grad_enabled():  # create_graph=True: the closed form as differentiable ops
            grad = divergence_loss_ref(*inputs)[3]
            return ((grad * grad_loss).to(grad.dtype), *[None] * 10)
        if torch.compiler.is_compiling():  # attributes set on ctx here do not survive the trace
            return ((ctx.grad * grad_loss).to(ctx.grad.dtype), *[None] * 10)
        # The gradient of the forward is scaled in place and returned; a second backward through a
        # retained graph recomputes it.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            grad = op("divergence_loss")(*inputs)[3]
        if batched(grad_loss):  # each cotangent needs separate memory
            return ((grad * grad_loss).to(grad.dtype), *[None] * 10)
        op("divergence_loss_backward")(grad, grad_loss)
        return (grad, *[None] * 10)


def _fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, ce, divergence = (logits.new_empty((), dtype=dtype) for _ in range(3))
    return loss, ce, divergence, torch.empty_like(logits)


register("divergence_loss", divergence_loss_ref, _fake)
register("divergence_loss_backward", divergence_loss_backward_ref, lambda *args: None)
