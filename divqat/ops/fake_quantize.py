"""Fake quantization with given scale and zero point, per tensor or per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from divqat.ops import reference
from divqat.ops._autograd import masked_grad, with_stride
from divqat.ops._check import (
    FLOAT32,
    check_axis,
    check_choice,
    check_float,
    check_qparam,
    check_range,
    check_untransformed,
    check_values,
    readable,
)
from divqat.ops._library import op, register
from divqat.ops._mask import unpack_mask, with_packed_mask


def fake_quantize(
    x: Tensor,  # any shape
    scale: Tensor,  # [] or [C]
    zero_point: Tensor,  # [] or [C]
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    *,
    nan: str = "propagate",
) -> Tensor:
    """Quantize and dequantize ``x``, with a straight-through gradient.

    y = (clamp(nearbyint(x / scale) + zero_point, quant_min, quant_max) − zero_point) · scale.
    The gradient passes where the rounded value lies in [quant_min, quant_max] and is exactly 0
    elsewhere (Jacob et al. 2018, §3; Bengio et al. 2013). Equal bit for bit to
    ``torch.fake_quantize_per_tensor_affine`` / ``_per_channel_affine`` on the CPU for finite
    inputs with |x / scale| < 2^63; ±Inf saturates.

    Args:
        x: float32, float64, bfloat16 or float16, any shape and strides.
        scale: float32 [] (or [1]), or [C] with ``ch_axis``; positive.
        zero_point: int32, shaped like ``scale``.
        quant_min: smallest code, inclusive.
        quant_max: largest code, inclusive.
        ch_axis: the channel axis of ``x``; None for one scale.
        nan: ``"propagate"`` keeps NaN; ``"aten"`` maps it to the lowest level as PyTorch does.

    Returns:
        A tensor like ``x`` (shape, dtype; dense strides are kept).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or option.
        IndexError: ``ch_axis`` is not an axis of ``x``.
        NotImplementedError: inside ``torch.func``.

    A scale that is not positive, or a zero point outside the range, raises a ValueError if it can
    be read without a host sync (on the CPU in eager mode). Otherwise the formula is applied
    unchanged: with such a zero point 0 is no longer represented; with such a scale the result is
    meaningless.
    """
    check_untransformed("fake_quantize")
    check_float("x", x)
    check_range(quant_min, quant_max)
    axis = check_axis(x, ch_axis)
    check_qparam("scale", scale, x, axis, (torch.float32,))
    check_qparam("zero_point", zero_point, x, axis, (torch.int32,))
    check_choice("nan", nan, ("propagate", "aten"))
    if readable(scale) and readable(zero_point):
        check_values("scale", scale, FLOAT32.tiny, FLOAT32.max)
        check_values("zero_point", zero_point, quant_min, quant_max)
    return FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, axis, nan == "propagate")


class FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        if x.numel() == 0:
            y, mask = fake_output_and_mask(x)
        else:
            y, mask = op("fake_quantize")(x, *args)
        ctx.save_for_backward(mask)
        ctx.stride = y.stride()
        ctx.inputs = 1 + len(args)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        grad_x = masked_grad(with_stride(grad_y, ctx.stride), mask)
        return (grad_x, *[None] * (ctx.inputs - 1))


def fake_output_and_mask(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Fake kernel: y like x, and one bit per element."""
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


register(
    "fake_quantize",
    reference.fake_quantize_ref,
    fake_output_and_mask,
    with_packed_mask(reference.fake_quantize_ref),
)
register(
    "fake_quantize_backward",
    reference.fake_quantize_backward_ref,
    lambda grad_y, mask: torch.empty_like(grad_y),
    lambda grad_y, mask: reference.fake_quantize_backward_ref(grad_y, unpack_mask(mask, grad_y)),
)
