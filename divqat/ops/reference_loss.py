"""The divergence loss in plain PyTorch: value and gradient together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from divqat.ops.reference import compute_dtype


def divergence_loss_ref(
    logits: Tensor,  # [N, C]
    teacher_logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    weight: Tensor,  # []
    temperature: float,
    direction: str,
    classes: str,
    bound: float | None,
    guard: bool,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L = mean(CE) − weight · T² · mean(D); returns L, mean CE, mean D and dL/dlogits.

    With u = logits / T, q = softmax(u), p = softmax(teacher / T), r = log q − log p,
    m = (q + p) / 2 and s = log q − log m:

    ==================  ==============================  ======================
    direction           D                               dD/du
    ==================  ==============================  ======================
    student_teacher     KL(q‖p) = Σ q r                 q (r − D)
    teacher_student     KL(p‖q) = − Σ p r               q − p
    js                  ½ KL(q‖m) + ½ KL(p‖m)           ½ q (s − KL(q‖m))
    ==================  ==============================  ======================
    """
    dtype = compute_dtype(logits.dtype)
    z, t = logits.to(dtype), teacher_logits.to(dtype)
    valid = target != ignore_index
    # A target that is neither a class nor ignored makes its CE and its gradient NaN: raising an
    # error would need a host sync.
    unknown = valid & ((target < 0) | (target >= z.shape[1]))
    label = torch.where(valid & ~unknown, target, 0)[:, None]
    count = valid.sum()
    share = valid.to(dtype)[:, None] / count  # [N, 1], each sample's share of the mean
    share = torch.where(unknown[:, None], torch.nan, share)

    # CE = − Σ_k target_k · log softmax(z)_k, target = (1 − ε) onehot + ε / C
    log_prob = torch.log_softmax(z, 1)
    ce = -log_prob.gather(1, label)
    if label_smoothing > 0:
        ce = (1 - label_smoothing) * ce - label_smoothing * log_prob.mean(1, keepdim=True)
    ce = torch.where(valid[:, None], torch.where(unknown[:, None], torch.nan, ce), 0.0)
    # dCE/dz = softmax(z) − target
    grad = log_prob.exp() * share
    grad.scatter_add_(1, label, -(1 - label_smoothing) * share)
    if label_smoothing > 0:
        grad -= share * (label_smoothing / z.shape[1])

    d, grad_u = _divergence(z / temperature, t / temperature, label, direction, classes)
    active = valid[:, None]
    if guard:
        active = active & (z.argmax(1, keepdim=True) == label)
    if bound is not None:
        active_grad = active & (d < bound)
        d = d.clamp(max=bound)
    else:
        active_grad = active
    d = torch.where(active, d, 0.0)
    grad_u = torch.where(active_grad, grad_u, 0.0)

    ce, divergence = ce.sum() / count, d.sum() / count
    # L = CE − λ T² D and dD/dz = dD/du / T. λ = 0 switches the term off even where D is infinite.
    weight = weight.to(dtype)
    penalty = torch.where(weight == 0, 0.0, weight * temperature**2 * divergence)
    grad -= torch.where(weight == 0, 0.0, weight * temperature * share * grad_u)
    grad = torch.where(valid[:, None], grad, 0.0)
    return ce - penalty, ce, divergence, grad.to(logits.dtype)


def divergence_loss_backward_ref(grad_logits: Tensor, grad_output: Tensor) -> None:
    """grad_logits ← grad_logits · grad_output, in place; grad_output is []."""
    grad_logits.mul_(grad_output)


def _divergence(
    u: Tensor, v: Tensor, label: Tensor, direction: str, classes: str
) -> tuple[Tensor, Tensor]:
    """D [N, 1] and dD/du [N, C] between softmax(u) and softmax(v)."""
    if classes == "non_label":
        # The renormalized distribution over every class but the label, as rows of C − 1.
        others = torch.arange(u.shape[1] - 1, device=u.device)
        others = others + (others >= label)
        d, grad_tail = _divergence(
            u.gather(1, others), v.gather(1, others), label, direction, "all"
        )
        return d, torch.zeros_like(u).scatter(1, others, grad_tail)
    log_q, log_p = torch.log_softmax(u, 1), torch.log_softmax(v, 1)
    q, p = log_q.exp(), log_p.exp()
    if direction == "teacher_student":
        return _expect(p, log_p - log_q), q - p
    if direction == "student_teacher":
        ratio = log_q - log_p
        d = _expect(q, ratio)
        return d, torch.where(q == 0, 0.0, q * (ratio - d))
    log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
    ratio = log_q - log_m
    student = _expect(q, ratio)
    d = 0.5 * (student + _expect(p, log_p - log_m))
    return d, torch.where(q == 0, 0.0, 0.5 * q * (ratio - student))


def _expect(weight: Tensor, value: Tensor) -> Tensor:
    """Σ_k weight_k · value_k with 0 · anything = 0, and NaN if a weight is NaN; [N, 1]."""
    return torch.where(weight == 0, 0.0, weight * value).sum(1, keepdim=True)
