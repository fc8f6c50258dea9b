"""Fake quantization with a learned scale and offset (LSQ, LSQ+)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from divqat.ops import reference
from divqat.ops._check import (
    check_axis,
    check_float,
    check_number,
    check_qparam,
    check_range,
    check_untransformed,
)
from divqat.ops._library import op, register


def fake_quantize_lsq(
    x: Tensor,  # any shape
    scale: Tensor,  # [] or [C]
    zero_point: Tensor,  # [] or [C]
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    *,
    grad_factor: float = 1.0,
) -> Tensor:
    """Quantize and dequantize ``x`` with trainable ``scale`` and, if float32, ``zero_point``.

    Values are those of :func:`fake_quantize`, with zero_point rounded half to even and clamped to
    the range, in both forward and backward (PyTorch's own op truncates zero_point + 0.5 in its
    backward). Gradients (Esser et al. 2020, "Learned Step Size Quantization", eq. 3; Bhalgat et al.
    2020, "LSQ+", for the offset), with v = x / scale:

    * dy/dx = 1 inside the range, 0 outside,
    * dy/dscale = nearbyint(v) − v inside, quant_min − zero_point below, quant_max − zero_point
      above, times ``grad_factor``,
    * dy/dzero_point = 0 inside, −scale outside, times ``grad_factor``.

    An optimizer step may move the scale to 0 or below. Values and gradients are therefore those of
    s = max(scale, ε) with ε = 2⁻²³, the smallest scale of an observer, and where scale ≤ ε the
    gradient g of the scale becomes −|g|, so that the next step raises it.

    Double backward differentiates these formulas almost everywhere (a rounded value is constant).

    Args:
        x: float32, float64, bfloat16 or float16, any shape and strides.
        scale: float32 [] or [C].
        zero_point: float32 or int32, shaped like ``scale``.
        quant_min, quant_max: smallest and largest code, inclusive.
        ch_axis: the channel axis of ``x``; None for one scale.
        grad_factor: factor on the gradients of scale and zero point, usually
            1 / sqrt(elements · quant_max) (Esser et al. 2020, §2.2); finite.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: see :func:`fake_quantize`.
    """
    check_untransformed("fake_quantize_lsq")
    check_float("x", x)
    check_range(quant_min, quant_max)
    axis = check_axis(x, ch_axis)
    check_qparam("scale", scale, x, axis, (torch.float32,))
    check_qparam("zero_point", zero_point, x, axis, (torch.float32, torch.int32))
    check_number("grad_factor", grad_factor)
    if not -math.inf < grad_factor < math.inf:
        raise ValueError(f"grad_factor: wanted a finite number, got {grad_factor}")
    return FakeQuantizeLSQ.apply(x, scale, zero_point, quant_min, quant_max, axis, grad_factor)


class FakeQuantizeLSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, *args: Any) -> Tensor:
        *ctx.range, ctx.grad_factor = args
        ctx.save_for_backward(x, scale, zero_point)
        if x.numel() == 0:
            return torch.empty_like(x)
        return op("fake_quantize_lsq")(x, scale, zero_point, *ctx.range)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under a checkpoint every access recomputes them
        args = (grad_y, *saved, *ctx.range, ctx.grad_factor)
        if grad_y.numel() == 0:
            grad_x, grad_scale, grad_zero_point = map(torch.zeros_like, saved)
        elif torch.is_grad_enabled():  # create_graph=True: the formulas as differentiable ops
            backward = reference.fake_quantize_lsq_backward_ref
            grad_x, grad_scale, grad_zero_point = backward(*args)
        else:
            grad_x, grad_scale, grad_zero_point = op("fake_quantize_lsq_backward")(*args)
        learned = saved[2].is_floating_point()
        return (grad_x, grad_scale, grad_zero_point if learned else None, *[None] * 4)


def _fake_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_zero_point = torch.empty_like(zero_point, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(scale), grad_zero_point


register("fake_quantize_lsq", reference.fake_quantize_lsq_ref, lambda x, *args: torch.empty_like(x))
register("fake_quantize_lsq_backward", reference.fake_quantize_lsq_backward_ref, _fake_backward)
