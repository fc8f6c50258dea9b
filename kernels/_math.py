"""Arithmetic that the kernels share, rounded as PyTorch rounds it.

Nothing here is left to a fast approximation: rounding and exponentials are libdevice's, division is
IEEE's, and kernels are launched without contraction to FMA (``_launch.launch``). Triton's
interpreter, which runs the kernels on CPU tensors, has no libdevice and gets stand-ins.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

INTERPRETED: bool = knobs.runtime.interpret

if INTERPRETED:

    @triton.jit
    def rint(x):
        # Adding 2^23 (2^52 in float64) leaves no room for a fraction; larger numbers have none.
        whole = 8388608.0 if x.dtype == tl.float32 else 4503599627370496.0
        size = tl.abs(x)
        rounded = tl.where(size < whole, (size + whole) - whole, size)
        return tl.where(x < 0, -rounded, rounded)

    @triton.jit
    def log1p(x):
        # log(u) misses log(1 + x) by the factor that u = 1 + x, rounded, misses 1 + x.
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
        # The interpreter cuts off what bfloat16 has no room for instead of rounding to even.
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
        """x rounded to the dtype of memory, half to even."""
        return x.to(dtype)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's own float32 division is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def compute(x):
    """float32 for half precision, else x itself."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def pack_mask(bits, BLOCK: tl.constexpr):
    """[BLOCK] of bool as [BLOCK / 32] int32, low bit first."""
    words = tl.reshape(bits.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
    return tl.sum(words, 1)


@triton.jit
def unpack_mask(packed, BLOCK: tl.constexpr):
    """[BLOCK / 8] bytes as [BLOCK] of bool, low bit first."""
    bits = (packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, [BLOCK]) != 0


@triton.jit
def is_last_program(counter, programs):
    """Whether this is the last of ``programs`` programs to arrive; the counter is left at 0.

    What the others stored before they arrived, the last one may load (with ".cg", past L1).
    """
    tl.debug_barrier()  # all threads of this program have stored before one of them arrives
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
