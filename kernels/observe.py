"""observe, and the scales of weights whose rows are not contiguous: one launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from divqat.kernels._channel_reduction import channel_offsets, plan, write_partial
from divqat.kernels._launch import channels_of, check_values, counters, dense, launch
from divqat.kernels._math import ceil_div, is_last_program
from divqat.kernels._min_max import reduce_min_max, reduce_partials, update_min_max
from divqat.kernels._qparams import symmetric_zero_point, update_qparams
from torch import Tensor

from divqat.ops._check import check_buffers

BUFFERS = ("running_min", "running_max", "scale", "zero_point")


@triton.jit
def _observe(
    x,
    running_min,
    running_max,
    scale,
    zero_point,
    partial,  # [parts, channels, 2]
    counters,
    channels,
    inner,
    length,
    quant_min: tl.float32,
    quant_max: tl.float32,
    averaging_constant: tl.float32,
    SCALE_ONLY: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    RELU: tl.constexpr,
    ONE_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part, parts = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    low = tl.full([BLOCK_C, BLOCK_K], float("inf"), tl.float32)
    high = tl.full([BLOCK_C, BLOCK_K], float("-inf"), tl.float32)
    for k in range(part, ceil_div(length, BLOCK_K), parts):
        at, inside = channel_offsets(k, c, channels, inner, length, ONE_CHANNEL, WIDE, BLOCK_K)
        value = tl.load(x + at, inside, other=0.0)
        low, high = update_min_max(low, high, value, value, inside)
    lowest, highest = reduce_min_max(low, high, 1)
    if parts == 1:
        update_qparams(
            lowest, highest, running_min, running_max, scale, zero_point, c, channels, quant_min,
            quant_max, averaging_constant, SCALE_ONLY, SYMMETRIC, ZERO_POINT, RELU,
        )  # fmt: skip
    else:
        write_partial(partial, part, channels, c, lowest, highest)
        if is_last_program(counters + tl.program_id(0), parts):
            least, most = reduce_partials(partial, parts, channels, c, BLOCK_C)
            update_qparams(
                least, most, running_min, running_max, scale, zero_point, c, channels,
                quant_min, quant_max, averaging_constant, SCALE_ONLY, SYMMETRIC, ZERO_POINT, RELU,
            )  # fmt: skip


def observe_dense(
    x: Tensor,
    buffers: tuple[Tensor | None, ...],
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    averaging_constant: float = 1.0,
    symmetric: bool = True,
    relu: bool = False,
) -> None:
    """Update (running_min, running_max, scale, zero_point) from a dense x. If the first two are
    None, take the symmetric scale of x itself, as for a weight.
    """
    channels, inner = channels_of(x, ch_axis)
    given = {k: b for k, b in zip(BUFFERS, buffers, strict=True) if b is not None}
    check_values(x, channels, **given)
    if x.numel() == 0:
        return
    grid, meta = plan(x, channels, inner)
    partial = x.new_empty(2 * channels * grid[1], dtype=torch.float32)
    launch(
        _observe, grid, x.device, x, *buffers, partial, counters(x.device, grid[0]), channels,
        inner, x.numel() // channels, float(quant_min), float(quant_max), float(averaging_constant),
        SCALE_ONLY=buffers[0] is None, SYMMETRIC=symmetric,
        ZERO_POINT=symmetric_zero_point(quant_min, quant_max), RELU=relu, **meta,
    )  # fmt: skip


@contextmanager
def contiguous_buffers(*buffers: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The buffers as contiguous tensors; copies are written back."""
    check_buffers(**dict(zip(BUFFERS, buffers, strict=True)))
    memory = tuple(buffer.contiguous() for buffer in buffers)
    yield memory
    for buffer, updated in zip(buffers, memory, strict=True):
        if updated is not buffer:
            buffer.copy_(updated)


def observe(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    averaging_constant: float,
    symmetric: bool,
    relu: bool,
) -> None:
    options = (quant_min, quant_max, ch_axis, averaging_constant, symmetric, relu)
    with contiguous_buffers(running_min, running_max, scale, zero_point) as buffers:
        observe_dense(dense(x)[0], buffers, *options)
