"""Arithmetic that the kernels share, rounded as in PyTorch.

Nothing here is a fast approximation: rounding and exponentials are libdevice's, division is IEEE,
and kernels are launched without contraction to FMA (``_launch.launch``). Triton's interpreter,
which runs the kernels on CPU tensors, has no libdevice and uses the replacements below.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

INTERPRETED: bool = knobs.runtime.interpret

if INTERPRETED:

    @triton.jit
    def rint(x):
        # Adding 2^23 (2^52 in float64) rounds the fraction away; larger numbers have none.
        whole = 8388608.0 if x.dtype == tl.float32 else 4503599627370496.0
        size = tl.abs(x)
        rounded = tl.where(size < whole, (size + whole) - whole, size)
        return tl.where(x < 0, -rounded, rounded)

    @triton.jit
    def log1p(x):
        # The rounding of u = 1 + x is corrected by x / (u − 1).
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))

    @triton.jit
    def exp(x):
        return tl.exp(x)

    @triton.jit
    def log(x):
        return tl.log(x)

    @triton.jit
    def cast(x, dtype: tl.constexpr):
        # The interpreter truncates to bfloat16 instead of rounding half to even.
        if dtype == tl.bfloat16 and x.dtype == tl.float32:
            word = x.to(tl.uint32, bitcast=True)
            even = word + 0x7FFF + ((word >> 16) & 1)
            half = tl.where(x != x, word | 0x400000, even) >> 16
            return half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(dtype)

else:
    rint, exp, log, log1p = libdevice.rint, libdevice.exp, libdevice.log, libdevice.log1p

    @triton.jit
    def cast(x, dtype: tl.constexpr):
        """x in the dtype of the output, rounded half to even."""
        return x.to(dtype)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded, which Triton's float32 division is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def compute(x):
    """x in the type to compute in: float64 for float64, float32 for all others."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def ceil_div(n, by: tl.constexpr):
    """ceil(n / by) for n ≥ 1. ``tl.cdiv`` adds first, which wraps in 32 bits near 2^31."""
    return (n - 1) // by + 1


@triton.jit
def clamp(x, low, high):
    """x clamped to [low, high]; NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def pack_mask(bits, BLOCK: tl.constexpr):
    """Packs bool [BLOCK] into int32 [BLOCK / 32], low bit first."""
    words = tl.reshape(bits.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
    return tl.sum(words, 1)


@triton.jit
def unpack_mask(packed, BLOCK: tl.constexpr):
    """Unpacks bytes [BLOCK / 8] into bool [BLOCK], low bit first."""
    bits = (packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, [BLOCK]) != 0


@triton.jit
def is_last_program(counter, programs):
    """Whether this program is the last of ``programs`` to call this; leaves the counter at 0.

    The last one can load what the others stored before their call, with ".cg": from L2.
    """
    tl.debug_barrier()  # all threads of this program have stored before it is counted
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
