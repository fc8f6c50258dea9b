"""Minimum and maximum: of a tile, and of the parts of a channel."""

import triton
import triton.language as tl
from divqat.kernels._channel_reduction import read_partials


@triton.jit
def update_min_max(low, high, least, most, inside):
    """Elementwise minimum and maximum with new values; the minimum becomes NaN with a NaN."""
    least = tl.where(inside, least.to(tl.float32), float("inf"))
    most = tl.where(inside, most.to(tl.float32), float("-inf"))
    return tl.minimum(low, least, propagate_nan=tl.PropagateNan.ALL), tl.maximum(high, most)


@triton.jit
def reduce_min_max(low, high, axis: tl.constexpr):
    """Minimum and maximum along an axis; both are NaN if there is a NaN."""
    nan = low != low
    any_nan = tl.max(nan.to(tl.int32), axis) > 0
    least = tl.min(tl.where(nan, float("inf"), low), axis)
    most = tl.max(tl.where(nan, float("-inf"), high), axis)
    return tl.where(any_nan, float("nan"), least), tl.where(any_nan, float("nan"), most)


@triton.jit
def reduce_partials(partial, parts, channels, c, BLOCK_C: tl.constexpr):
    """Minimum and maximum [BLOCK_C] over the parts of each channel."""
    BLOCK_P: tl.constexpr = 512 // BLOCK_C
    low = tl.full([BLOCK_C, BLOCK_P], float("inf"), tl.float32)
    high = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
    for first in range(0, parts, BLOCK_P):
        least, most, there = read_partials(
            partial, first, parts, channels, c, float("inf"), float("-inf"), BLOCK_P
        )
        low, high = update_min_max(low, high, least, most, there)
    return reduce_min_max(low, high, 1)
