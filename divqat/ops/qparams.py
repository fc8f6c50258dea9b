"""The arithmetic of scales and zero points in plain PyTorch, bit-equal to csrc/qparams.h."""

from __future__ import annotations

import torch
from torch import Tensor

# The smallest scale, so that an all-zero tensor is defined.
EPS = torch.finfo(torch.float32).eps


def _count(levels: int, like: Tensor) -> Tensor:
    """``levels`` to divide by, on the device. To divide by a Python number, or by a tensor on the
    CPU, ATen's CUDA kernels multiply by its reciprocal, which rounds differently."""
    return torch.full((), levels, dtype=torch.float32, device=like.device)


def _as_scale(step: Tensor, levels: int) -> Tensor:
    """A step as a scale: at least ε; a step over a single level may overflow float32."""
    return step.clamp(EPS, torch.finfo(torch.float32).max if levels == 1 else None)


def choose_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) that cover [low, high] and 0.

    Symmetric: scale = 2 · max|·| / (quant_max − quant_min), zero point 0 (the middle code for an
    unsigned range). Affine: scale = (high − low) / (quant_max − quant_min), zero point rounded and
    clamped. Scales are at least float32's epsilon.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    levels = quant_max - quant_min
    count = _count(levels, low)
    if symmetric:  # divide first, as twice the maximum may overflow
        scale = _as_scale(torch.maximum(-low, high) / count * 2, levels)
        middle = 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    width = high - low  # may overflow as well
    step = torch.where(width.isfinite(), width / count, high / count - low / count)
    scale = _as_scale(step, levels)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num().to(torch.int32)


def moved(running: Tensor, batch: Tensor, weight: float) -> Tensor:
    """running + weight · (batch − running), or the first batch itself.

    The difference may overflow; the average does not.
    """
    step = batch - running
    apart = running - weight * running + weight * batch
    average = torch.where(step.isfinite(), running + weight * step, apart)
    return torch.where(running.isfinite(), average, batch)


def positive(scale: Tensor) -> Tensor:
    """max(scale, ε), the effective value of a learned scale."""
    return scale.clamp(min=EPS)


def lsq_scale_grad(grad: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a learned scale; at ε and below, −|gradient|, which can only raise the scale.

    Below ε the loss does not depend on the scale, so nothing would stop its descent.
    """
    return torch.where(scale <= EPS, -grad.abs(), grad)
