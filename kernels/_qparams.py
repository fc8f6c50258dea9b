"""Scales and zero points: the arithmetic of csrc/qparams.h, and one step of an observer."""

import triton
import triton.language as tl
from divqat.kernels._math import clamp, rint

EPS = tl.constexpr(1.1920928955078125e-07)  # of float32
MOST = tl.constexpr(3.4028234663852886e38)  # the largest float32


@triton.jit
def round_to_code(x, scale, zero_point):
    """nearbyint(x · (1/scale)) + zero_point, not clamped, and x · (1/scale)."""
    inv_scale = tl.div_rn(1.0, scale)
    v = x * inv_scale.to(x.dtype)
    return rint(v) + zero_point.to(x.dtype), v


@triton.jit
def dequantize(level, scale, PER_TENSOR: tl.constexpr):
    """(q − zero_point) · scale; float64 with one scale multiplies in float32, as ATen does."""
    if PER_TENSOR and level.dtype == tl.float64:
        return (level.to(tl.float32) * scale).to(tl.float64)
    else:
        return level * scale.to(level.dtype)


@triton.jit
def round_zero_point(zero_point, quant_min, quant_max):
    """A learned zero point, rounded and clamped, as LSQ uses it."""
    return clamp(rint(zero_point.to(tl.float32)), quant_min, quant_max)


@triton.jit
def positive(scale):
    """max(scale, ε), the smallest scale; NaN stays NaN."""
    return tl.where(scale < EPS, EPS, scale)


@triton.jit
def as_scale(step, levels):
    """A step between two levels as a scale; with one level it may exceed the largest float."""
    most = tl.where(levels == 1, MOST, float("inf"))
    return positive(tl.where(step > most, most, step))


@triton.jit
def symmetric_scale(low, high, quant_min, quant_max):
    """2 · max|·| / (quant_max − quant_min), at least ε; NaN if low is."""
    amax = tl.where((-low > high) | (low != low), -low, high)
    levels = quant_max - quant_min
    return as_scale(
        tl.div_rn(amax, levels) * 2.0, levels
    )  # in this order, as 2 · amax may overflow


def symmetric_zero_point(quant_min: int, quant_max: int) -> int:
    return 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2


@triton.jit
def _is_finite(x):
    return (x - x) == 0.0


@triton.jit
def _moved(running, batch, weight):
    """The moving average running + weight · (batch − running), or batch if it is the first. The
    difference may overflow; the average does not.
    """
    step = batch - running
    apart = running - weight * running + weight * batch
    average = tl.where(_is_finite(step), running + weight * step, apart)
    return tl.where(_is_finite(running), average, batch)


@triton.jit
def observe_channels(
    low,  # [C] the batch's minimum, ignored if it or the maximum is NaN or infinite
    high,
    running_min,  # pointers
    running_max,
    scale,
    zero_point,
    c,  # [C] channels
    here,  # [C] which channels exist
    quant_min,
    quant_max,
    averaging_constant,
    SYMMETRIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,  # the zero point if symmetric
    RELU: tl.constexpr,
):
    """One step of the moving averages, then scale and zero point, as in observe_ref."""
    if RELU:
        low, high = tl.where(low < 0, 0.0, low), tl.where(high < 0, 0.0, high)
    old_min = tl.load(running_min + c, here, other=0.0)
    old_max = tl.load(running_max + c, here, other=0.0)
    usable = _is_finite(low) & _is_finite(high)
    new_min = tl.where(usable, _moved(old_min, low, averaging_constant), old_min)
    new_max = tl.where(usable, _moved(old_max, high, averaging_constant), old_max)
    tl.store(running_min + c, new_min, here)
    tl.store(running_max + c, new_max, here)
    observed = here & _is_finite(new_min)
    bottom = tl.where(new_min > 0, 0.0, new_min)
    top = tl.where(new_max < 0, 0.0, new_max)
    if SYMMETRIC:
        step = symmetric_scale(bottom, top, quant_min, quant_max)
        offset = tl.full(c.shape, ZERO_POINT, tl.int32)
    else:
        # scale = (high − low) / levels; zero_point = quant_min − nearbyint(low / scale). high − low
        # may overflow.
        width, levels = top - bottom, quant_max - quant_min
        apart = tl.div_rn(top, levels) - tl.div_rn(bottom, levels)
        step = as_scale(tl.where(_is_finite(width), tl.div_rn(width, levels), apart), levels)
        code = clamp(quant_min - rint(tl.div_rn(bottom, step)), quant_min, quant_max)
        offset = tl.where(observed, code, 0.0).to(tl.int32)
    tl.store(scale + c, step, observed)
    tl.store(zero_point + c, offset, observed)


@triton.jit
def update_qparams(
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
    SCALE_ONLY: tl.constexpr,  # take the symmetric scale of [low, high], without an observer
    SYMMETRIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    RELU: tl.constexpr,
):
    """Update the observer, or the scale alone, from the minimum and maximum of each channel."""
    if SCALE_ONLY:
        tl.store(scale + c, symmetric_scale(low, high, quant_min, quant_max), c < channels)
        tl.store(zero_point + c, tl.full(c.shape, 0, tl.int32), c < channels)
    else:
        observe_channels(
            low, high, running_min, running_max, scale, zero_point, c, c < channels, quant_min,
            quant_max, averaging_constant, SYMMETRIC, ZERO_POINT, RELU,
        )  # fmt: skip
