"""Minimum and maximum, and what becomes of them: an observer's next state."""

import triton
import triton.language as tl
from divqat.kernels._channels import handed_in
from divqat.kernels._math import as_scale, clamp, rint, symmetric_scale


@triton.jit
def _is_finite(x):
    return (x - x) == 0.0


@triton.jit
def add_to_range(low, high, least, most, inside):
    """Elementwise minimum, which keeps NaN, and maximum."""
    least = tl.where(inside, least.to(tl.float32), float("inf"))
    most = tl.where(inside, most.to(tl.float32), float("-inf"))
    return tl.minimum(low, least, propagate_nan=tl.PropagateNan.ALL), tl.maximum(high, most)


@triton.jit
def total_range(low, high, axis: tl.constexpr):
    """Minimum and maximum along an axis; NaN in both after a NaN."""
    nan = low != low
    any_nan = tl.max(nan.to(tl.int32), axis) > 0
    least = tl.min(tl.where(nan, float("inf"), low), axis)
    most = tl.max(tl.where(nan, float("-inf"), high), axis)
    return tl.where(any_nan, float("nan"), least), tl.where(any_nan, float("nan"), most)


@triton.jit
def _moved(running, batch, weight):
    """running + weight · (batch − running), or the first batch as it is. The difference may be too
    large for a float; the average is not.
    """
    step = batch - running
    apart = running - weight * running + weight * batch
    average = tl.where(_is_finite(step), running + weight * step, apart)
    return tl.where(_is_finite(running), average, batch)


@triton.jit
def update(
    low,  # [C] the batch's range; NaN in both: not observed
    high,
    running_min,  # pointers
    running_max,
    scale,
    zero_point,
    c,  # [C] channels
    here,  # [C] whether there is such a channel
    quant_min,
    quant_max,
    averaging_constant,
    SYMMETRIC: tl.constexpr,
    MIDDLE: tl.constexpr,  # the zero point if symmetric
    RELU: tl.constexpr,
):
    """One step of the moving average, then scale and zero point: observe_ref."""
    if RELU:
        low, high = tl.where(low < 0, 0.0, low), tl.where(high < 0, 0.0, high)
    old_min = tl.load(running_min + c, here, other=0.0)
    old_max = tl.load(running_max + c, here, other=0.0)
    usable = _is_finite(low) & _is_finite(high)
    new_min = tl.where(usable, _moved(old_min, low, averaging_constant), old_min)
    new_max = tl.where(usable, _moved(old_max, high, averaging_constant), old_max)
    tl.store(running_min + c, new_min, here)
    tl.store(running_max + c, new_max, here)
    seen = here & _is_finite(new_min)
    bottom = tl.where(new_min > 0, 0.0, new_min)
    top = tl.where(new_max < 0, 0.0, new_max)
    if SYMMETRIC:
        step = symmetric_scale(bottom, top, quant_min, quant_max)
        offset = tl.full(c.shape, MIDDLE, tl.int32)
    else:
        # scale = (high − low) / levels; zero_point = quant_min − nearbyint(low / scale). high − low
        # may be too large for a float.
        width, levels = top - bottom, quant_max - quant_min
        apart = tl.div_rn(top, levels) - tl.div_rn(bottom, levels)
        step = as_scale(tl.where(_is_finite(width), tl.div_rn(width, levels), apart), levels)
        code = clamp(quant_min - rint(tl.div_rn(bottom, step)), quant_min, quant_max)
        offset = tl.where(seen, code, 0.0).to(tl.int32)
    tl.store(scale + c, step, seen)
    tl.store(zero_point + c, offset, seen)


@triton.jit
def finish(
    low,
    high,
    running_min,
    running_max,
    scale,
    zero_point,
    c,
    channels,
    quant_min,
    quant_max,
    averaging_constant,
    WEIGHTS: tl.constexpr,  # there is no observer, only a scale
    SYMMETRIC: tl.constexpr,
    MIDDLE: tl.constexpr,
    RELU: tl.constexpr,
):
    if WEIGHTS:
        tl.store(scale + c, symmetric_scale(low, high, quant_min, quant_max), c < channels)
        tl.store(zero_point + c, tl.full(c.shape, 0, tl.int32), c < channels)
    else:
        update(
            low, high, running_min, running_max, scale, zero_point, c, c < channels, quant_min,
            quant_max, averaging_constant, SYMMETRIC, MIDDLE, RELU,
        )  # fmt: skip


@triton.jit
def range_of_parts(partial, parts, channels, c, BLOCK_C: tl.constexpr):
    BLOCK_P: tl.constexpr = 512 // BLOCK_C
    low = tl.full([BLOCK_C, BLOCK_P], float("inf"), tl.float32)
    high = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
    for first in range(0, parts, BLOCK_P):
        least, most, there = handed_in(
            partial, first, parts, channels, c, float("inf"), float("-inf"), BLOCK_P
        )
        low, high = add_to_range(low, high, least, most, there)
    return total_range(low, high, 1)
