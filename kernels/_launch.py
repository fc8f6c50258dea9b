"""What the launchers share: layouts, masks, counters and launches."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# Tiles of large tensors have two to four 16-byte loads in flight per thread; those of small tensors
# are smaller, to fill the device. With only two sizes, a new batch size needs no compilation.
SMALL = 1 << 18  # elements
# Beyond this many elements, offsets take 64 bits, which is slower.
WIDE = 2**31 - 2**16


def block_of(n: int, itemsize: int) -> dict[str, int]:
    """BLOCK and num_warps for a pass over n elements."""
    if n <= SMALL:
        return {"BLOCK": 1024, "num_warps": 4}
    return {"BLOCK": 4096 if itemsize <= 4 else 2048, "num_warps": 8}


def dense(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, or a dense copy of it, and an empty tensor with the same strides."""
    y = torch.empty_like(x)
    return (x if x.stride() == y.stride() else torch.empty_like(x).copy_(x)), y


def laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """``value``, or a copy with the strides of ``like``, which is dense."""
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def channels_of(dense_x: Tensor, ch_axis: int | None) -> tuple[int, int]:
    """(channels, inner): the element at memory offset i has channel (i // inner) % channels."""
    if ch_axis is None or dense_x.shape[ch_axis] == 1:
        return 1, dense_x.numel()
    return dense_x.shape[ch_axis], dense_x.stride(ch_axis)


def check_values(x: Tensor, count: int, **values: Tensor) -> None:
    """Check that what a kernel reads through a pointer is on x's device and has ``count`` values.

    Raises:
        ValueError: it is not, or has not.
    """
    for name, value in values.items():
        if value.device != x.device:
            raise ValueError(f"{name}: wanted it on {x.device} like x, got {value.device}")
        if value.numel() != count or not value.is_contiguous():
            raise ValueError(
                f"{name}: wanted {count} contiguous value(s) beside x {list(x.shape)}, "
                f"got {list(value.shape)} with strides {value.stride()}"
            )


def check_same(name: str, value: Tensor, x: Tensor) -> None:
    """Check that ``value`` has the device, dtype and shape of x.

    Raises:
        ValueError: it has not.
    """
    if value.device != x.device or value.dtype != x.dtype or value.shape != x.shape:
        raise ValueError(
            f"{name}: wanted {list(x.shape)} {x.dtype} on {x.device}, "
            f"got {list(value.shape)} {value.dtype} on {value.device}"
        )


def empty_mask(x: Tensor) -> Tensor:
    """uint8 [ceil(N / 8)] in memory of whole int32 words, as the kernels write words."""
    n = x.numel()
    if n % 32 == 0:
        return x.new_empty(n // 8, dtype=torch.uint8)
    return x.new_empty(4 * ((n + 31) // 32), dtype=torch.uint8)[: (n + 7) // 8]


@functools.cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a CUDA device; for the interpreter, 2."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident_programs(device: torch.device) -> int:
    """Programs of a reduction: one wave, at 128 registers per thread and 256 threads."""
    return 2 * processors(device)


def _zeros(count: int, device: torch.device) -> Tensor:
    """int32 zeros for any stream."""
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return zeros


class _Counters:
    """int32 zeros for the launches of one device, which leave them at 0.

    Launches that may run at the same time must not share a counter. Eager launches cycle through
    one half, so that two with the same counter are half a million launches apart. Captured launches
    may run at any time; they cycle through the other half.
    """

    HALF = 1 << 19

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "divqat: a captured step must have run once before: the Triton kernels are not "
                f"set up on {device}"
            )
        # In a thread of their own: in the warm-up of a graph (torch.compile with CUDA graphs), what
        # its thread and stream allocate comes from the memory of that graph, which is used again.
        with ThreadPoolExecutor(1) as thread:
            self.zeros = thread.submit(_zeros, 2 * self.HALF, device).result()
        self.used = [0, 0]
        self.lock = threading.Lock()

    def take(self, count: int) -> Tensor:
        count = (
            (count + 3) // 4 * 4
        )  # aligned to 16 bytes, as Triton recompiles for another alignment
        captured = self.zeros.is_cuda and torch.cuda.is_current_stream_capturing()
        with self.lock:
            first = self.used[captured]
            if first + count > self.HALF:
                first = 0
            self.used[captured] = first + count
        return self.zeros[self.HALF * captured + first :]


_counters_of = functools.cache(_Counters)


def counters(device: torch.device, count: int = 1) -> Tensor:
    """At least ``count`` zeros for ``_math.is_last_program``."""
    return _counters_of(device).take(count)


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Launch on a device, without contraction to FMA, which rounds differently."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, enable_fp_fusion=False, **meta)
    else:
        kernel[grid](*args, enable_fp_fusion=False, **meta)
