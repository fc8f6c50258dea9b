"""Reductions per channel, split between programs.

A channel's elements are numbered k = 0 … length − 1 in memory order. A program reduces BLOCK_C
channels over every parts-th run of BLOCK_K elements. The last program of a tile of channels reduces
the partial results of all its parts, in a fixed order, so that the result is deterministic.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from divqat.kernels._launch import SMALL, WIDE, resident_programs
from torch import Tensor


def plan(x: Tensor, channels: int, inner: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The launch grid (tiles of channels, parts) and the constants of a reduction of a dense x."""
    length = x.numel() // channels
    small = length <= SMALL
    block = 1024 if small else 4096
    # With inner == 1, a row of the tile is contiguous in memory.
    block_c = min(64, triton.next_power_of_2(channels)) if inner == 1 and channels > 1 else 1
    block_k = block // block_c
    tiles = triton.cdiv(channels, block_c)
    parts = min(triton.cdiv(length, block_k), max(1, resident_programs(x.device) // tiles))
    return (tiles, parts), {
        "ONE_CHANNEL": channels == 1,
        "WIDE": x.numel() > WIDE,
        "BLOCK_C": block_c,
        "BLOCK_K": block_k,
        "num_warps": 4 if small else 8,
    }


@triton.jit
def channel_offsets(
    run,  # index of the run
    c,  # [BLOCK_C] channels
    channels,
    inner,
    length,
    ONE_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Memory offsets [BLOCK_C, BLOCK_K] of a run of each channel, and which are valid."""
    if WIDE:
        run, c = tl.full([1], 0, tl.int64) + run, c.to(tl.int64)
    k = run * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (k < length)[None, :]
    if ONE_CHANNEL:
        at = k[None, :]
    else:
        inside = inside & (c < channels)[:, None]
        stride = inner * channels.to(c.dtype)  # between two runs of `inner` elements of a channel
        at = (c * inner)[:, None] + ((k // inner) * stride + k % inner)[None, :]
    return at, inside


@triton.jit
def write_partial(partial, part, channels, c, a, b):
    """Store the two values of a part per channel; partial is [parts, channels, 2]."""
    at = partial + 2 * (part * channels + c)
    tl.store(at, a, c < channels)
    tl.store(at + 1, b, c < channels)


@triton.jit
def read_partials(partial, first, parts, channels, c, empty_a, empty_b, BLOCK_P: tl.constexpr):
    """The two values of BLOCK_P parts from ``first`` on, [BLOCK_C, BLOCK_P], and which exist."""
    p = first + tl.arange(0, BLOCK_P)
    there = (c < channels)[:, None] & (p < parts)[None, :]
    at = partial + 2 * (p[None, :] * channels + c[:, None])
    # From L2: other programs wrote these, and L1 is not coherent.
    a = tl.load(at, there, other=empty_a, cache_modifier=".cg")
    b = tl.load(at + 1, there, other=empty_b, cache_modifier=".cg")
    return a, b, there
