"""fake_quantize and its backward: one launch each, 8.125 bytes per float32 element.

A dense tensor of any layout is processed as n elements in memory order; the element at offset i has
channel (i // inner) % channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from divqat.kernels._launch import (
    WIDE,
    block_of,
    channels_of,
    check_values,
    dense,
    empty_mask,
    launch,
)
from divqat.kernels._math import cast, ceil_div, clamp, compute, pack_mask, unpack_mask
from divqat.kernels._qparams import dequantize, positive, round_to_code, round_zero_point
from torch import Tensor


@triton.jit
def offsets(tile, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the elements of a tile, in 64 bits if WIDE."""
    if WIDE:
        tile = tl.full([1], 0, tl.int64) + tile
    return tile * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def quantize_tile(
    x,  # [n] pointer
    y,  # [n] pointer
    mask,  # [ceil(n / 32)] int32 pointer, or None
    tile,
    i,  # [BLOCK] the tile's elements
    n,
    scale,  # [] or [BLOCK] float32
    zero_point,  # [] or [BLOCK]
    quant_min,
    quant_max,
    PER_TENSOR: tl.constexpr,
    PROPAGATE_NAN: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize-dequantize a tile; returns x's values [BLOCK], 0 past the end."""
    given = compute(tl.load(x + i, i < n, other=0.0))
    value = tl.where(given < 0, 0.0, given).to(given.dtype) if RELU else given
    # q = clamp(nearbyint(x · (1/scale)) + zero_point)
    rounded, _ = round_to_code(value, scale, zero_point)
    q = clamp(rounded, quant_min, quant_max)
    inside = (rounded == q) & (i < n)
    if not PROPAGATE_NAN:
        q = tl.where(q != q, quant_min, q)
    # y = (q − zero_point) · scale
    result = dequantize(q - zero_point.to(given.dtype), scale, PER_TENSOR)
    tl.store(y + i, cast(result, y.dtype.element_ty), i < n)
    if mask is not None:
        if RELU:
            inside = inside & (given > 0)
        word = offsets(tile, BLOCK // 32, i.dtype == tl.int64)
        words = mask.to(tl.pointer_type(tl.int32)) + word
        tl.store(words, pack_mask(inside, BLOCK), word < ceil_div(n, 32))
    return given


@triton.jit
def _fake_quantize(
    x,
    y,
    mask,
    scale,
    zero_point,
    n,
    channels,
    inner,
    quant_min: tl.float32,
    quant_max: tl.float32,
    PER_TENSOR: tl.constexpr,
    LEARNED: tl.constexpr,
    PROPAGATE_NAN: tl.constexpr,
    RELU: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    if REVERSE:
        tile = tl.num_programs(0) - 1 - tile
    i = offsets(tile, BLOCK, WIDE)
    if PER_TENSOR:
        s, z = tl.load(scale), tl.load(zero_point)
    else:
        channel = (i // inner) % channels
        s, z = tl.load(scale + channel), tl.load(zero_point + channel)
    if LEARNED:
        s = positive(s)
        z = round_zero_point(z, quant_min, quant_max)
    quantize_tile(
        x, y, mask, tile, i, n, s, z, quant_min, quant_max, PER_TENSOR, PROPAGATE_NAN, RELU, BLOCK
    )  # fmt: skip


def quantize(
    x: Tensor,  # dense
    y: Tensor,  # laid out like x
    mask: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    *,
    learned: bool = False,
    propagate_nan: bool = True,
    relu: bool = False,
    reverse: bool = False,
) -> None:
    """Launch over x. ``reverse`` starts with the last tile, which L2 may still hold."""
    channels, inner = channels_of(x, ch_axis)
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    check_values(x, channels, scale=scale, zero_point=zero_point)
    n = x.numel()
    if n == 0:
        return
    meta = block_of(n, x.element_size())
    launch(
        _fake_quantize, (triton.cdiv(n, meta["BLOCK"]),), x.device, x, y, mask, scale, zero_point,
        n, channels, inner, float(quant_min), float(quant_max), PER_TENSOR=ch_axis is None,
        LEARNED=learned, PROPAGATE_NAN=propagate_nan, RELU=relu, REVERSE=reverse,
        WIDE=n > WIDE, **meta,
    )  # fmt: skip


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    propagate_nan: bool,
) -> tuple[Tensor, Tensor]:
    x, y = dense(x)
    mask = empty_mask(x)
    quantize(
        x, y, mask, scale, zero_point, quant_min, quant_max, ch_axis, propagate_nan=propagate_nan
    )
    return y, mask


@triton.jit
def _masked_grad(grad_y, mask, grad_x, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = offsets(tl.program_id(0), BLOCK, WIDE)
    grad = tl.load(grad_y + i, i < n)
    byte = offsets(tl.program_id(0), BLOCK // 8, WIDE)
    kept = unpack_mask(tl.load(mask + byte, byte < ceil_div(n, 8), other=0), BLOCK)
    tl.store(grad_x + i, tl.where(kept, grad, 0.0).to(grad.dtype), i < n)


def masked_grad(grad_y: Tensor, mask: Tensor, grad_x: Tensor) -> None:
    """grad_x ← grad_y where the mask is set, else 0; both are dense with the same strides."""
    n = grad_y.numel()
    if n == 0:
        return
    meta = block_of(n, grad_y.element_size())
    grid = (triton.cdiv(n, meta["BLOCK"]),)
    launch(_masked_grad, grid, grad_y.device, grad_y, mask, grad_x, n, WIDE=n > WIDE, **meta)


def fake_quantize_backward(grad_y: Tensor, mask: Tensor) -> Tensor:
    n, grad_x = grad_y.numel(), torch.empty_like(grad_y)
    if grad_x.stride() != grad_y.stride():
        raise ValueError(
            "grad_y: wanted a dense tensor in the mask's memory order, "
            f"got strides {grad_y.stride()}"
        )
    if mask.dtype != torch.uint8:
        raise TypeError(f"mask: wanted uint8, got {mask.dtype}")
    check_values(grad_y, (n + 7) // 8, mask=mask)
    masked_grad(grad_y, mask, grad_x)
    return grad_x
