"""fake_quantize_lsq, 8 bytes per float32 element, and its backward, 12: one launch each.

The backward sums in float32 per lane, and in float64 over lanes and programs in a fixed order: it
is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from divqat.kernels._channel_reduction import channel_offsets, plan, read_partials, write_partial
from divqat.kernels._launch import (
    channels_of,
    check_same,
    check_values,
    counters,
    dense,
    laid_out_as,
    launch,
)
from divqat.kernels._math import ceil_div, clamp, compute, is_last_program
from divqat.kernels._qparams import EPS, positive, round_to_code, round_zero_point
from divqat.kernels.fake_quantize import quantize
from torch import Tensor


def fake_quantize_lsq(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
) -> Tensor:
    x, y = dense(x)
    quantize(x, y, None, scale, zero_point, quant_min, quant_max, ch_axis, learned=True)
    return y


@triton.jit
def _store_grads(
    grad_scale, grad_zero_point, c, channels, given, scale_sum, outside_sum, grad_factor
):
    grad = (scale_sum * grad_factor).to(tl.float32)
    # At ε and below, the gradient may only raise the scale (csrc/qparams.h).
    tl.store(grad_scale + c, tl.where(given <= EPS, -tl.abs(grad), grad), c < channels)
    if grad_zero_point is not None:
        # dy/dzero_point = −scale outside, 0 inside
        grad = -outside_sum * positive(given).to(tl.float64) * grad_factor
        tl.store(grad_zero_point + c, grad.to(tl.float32), c < channels)


@triton.jit
def _lsq_backward(
    grad_y,
    x,
    scale,
    zero_point,
    grad_x,
    grad_scale,
    grad_zero_point,  # or None
    partial,  # [parts, channels, 2] float64
    counters,
    channels,
    inner,
    length,
    quant_min: tl.float32,
    quant_max: tl.float32,
    grad_factor: tl.float64,
    ONE_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part, parts = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    given_scale = tl.load(scale + c, c < channels, other=1.0)
    s = positive(given_scale)
    z = round_zero_point(tl.load(zero_point + c, c < channels, other=0), quant_min, quant_max)
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    scale_sum = tl.full([BLOCK_C, BLOCK_K], 0, A)
    outside_sum = tl.full([BLOCK_C, BLOCK_K], 0, A)
    for run in range(part, ceil_div(length, BLOCK_K), parts):
        at, there = channel_offsets(run, c, channels, inner, length, ONE_CHANNEL, WIDE, BLOCK_K)
        given = tl.load(grad_y + at, there, other=0.0)
        grad = compute(given)
        value = compute(tl.load(x + at, there, other=0.0))
        rounded, v = round_to_code(value, s[:, None], z[:, None])
        q = clamp(rounded, quant_min, quant_max)
        inside = rounded == q
        # dy/dscale = q − zero_point − (x / scale inside, 0 outside)
        term = grad * (q - z[:, None].to(A) - tl.where(inside, v, 0.0))
        scale_sum += tl.where(there, term, 0.0)
        outside_sum += tl.where(inside, 0.0, grad)
        tl.store(grad_x + at, tl.where(inside, given, 0.0).to(given.dtype), there)
    scale_total = tl.sum(scale_sum.to(tl.float64), 1)
    outside_total = tl.sum(outside_sum.to(tl.float64), 1)
    if parts == 1:
        _store_grads(
            grad_scale, grad_zero_point, c, channels, given_scale, scale_total, outside_total,
            grad_factor,
        )  # fmt: skip
    else:
        write_partial(partial, part, channels, c, scale_total, outside_total)
        if is_last_program(counters + tl.program_id(0), parts):
            BLOCK_P: tl.constexpr = 512 // BLOCK_C
            scale_parts = tl.full([BLOCK_C, BLOCK_P], 0, tl.float64)
            outside_parts = tl.full([BLOCK_C, BLOCK_P], 0, tl.float64)
            for first in range(0, parts, BLOCK_P):
                a, b, _ = read_partials(partial, first, parts, channels, c, 0.0, 0.0, BLOCK_P)
                scale_parts += a
                outside_parts += b
            _store_grads(
                grad_scale, grad_zero_point, c, channels, given_scale, tl.sum(scale_parts, 1),
                tl.sum(outside_parts, 1), grad_factor,
            )  # fmt: skip


def fake_quantize_lsq_backward(
    grad_y: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_same("grad_y", grad_y, x)
    x, grad_x = dense(x)
    grad_y = laid_out_as(grad_y, x)
    channels, inner = channels_of(x, ch_axis)
    learned = zero_point.is_floating_point()
    grad_scale = scale.new_empty(scale.shape)
    # an integer zero point has no gradient
    grad_zero_point = (torch.empty if learned and x.numel() else torch.zeros)(
        zero_point.shape, dtype=torch.float32, device=x.device
    )
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    check_values(x, channels, scale=scale, zero_point=zero_point)
    if x.numel() == 0:
        return grad_x, grad_scale.zero_(), grad_zero_point
    grid, meta = plan(x, channels, inner)
    partial = x.new_empty(2 * channels * grid[1], dtype=torch.float64)
    launch(
        _lsq_backward, grid, x.device, grad_y, x, scale, zero_point, grad_x, grad_scale,
        grad_zero_point if learned else None, partial, counters(x.device, grid[0]), channels,
        inner, x.numel() // channels, float(quant_min), float(quant_max), float(grad_factor),
        **meta,
    )  # fmt: skip
    return grad_x, grad_scale, grad_zero_point
