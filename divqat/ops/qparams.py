"""The arithmetic of scales and zero points in plain PyTorch, bit for bit as csrc/qparams.h."""

from __future__ import annotations

import torch
from torch import Tensor

# The smallest scale, so that an all-zero tensor is defined.
EPS = torch.finfo(torch.float32).eps


def _as_scale(step: Tensor, levels: int) -> Tensor:
    """The width of a range over its levels; one level may be too wide for a float."""
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
    if symmetric:  # divided first, as twice the maximum may be too large for a float
        scale = _as_scale(torch.maximum(-low, high) / levels * 2, levels)
        middle = 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    width = high - low  # may be too large for a float as well
    step = torch.where(width.isfinite(), width / levels, high / levels - low / levels)
    scale = _as_scale(step, levels)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num().to(torch.int32)


def moved(running: Tensor, batch: Tensor, weight: float) -> Tensor:
    """running + weight · (batch − running), or the first batch as it is.

    The difference may be too large for a float; the average is not.
    """
    step = batch - running
    apart = running - weight * running + weight * batch
    average = torch.where(step.isfinite(), running + weight * step, apart)
    return torch.where(running.isfinite(), average, batch)


def positive(scale: Tensor) -> Tensor:
    """max(scale, ε): what a learned scale quantizes with."""
    return scale.clamp(min=EPS)


def lsq_scale_grad(grad: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a learned scale; at ε and below, −|gradient|, which only raises the scale.

    A step down would have no end there: it changes nothing that the loss could see.
    """
    return torch.where(scale <= EPS, -grad.abs(), grad)
