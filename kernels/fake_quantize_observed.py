"""fake_quantize_observed.

exact     two launches: observe, then quantize from the last tile to the first, as L2 still holds
          the last ones; 20.25 bytes per float32 element if x does not fit into L2. (One launch
          would need a grid barrier, and Triton's interpreter runs programs one after another.)
delayed   one launch: quantizes with the old range while it takes the new one; 16.25 bytes
frozen    fake_quantize
Per channel, which is rare for activations, delayed takes two launches, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from divqat.kernels._channel_reduction import write_partial
from divqat.kernels._launch import (
    WIDE,
    block_of,
    check_values,
    counters,
    dense,
    empty_mask,
    launch,
    resident_programs,
)
from divqat.kernels._math import ceil_div, is_last_program
from divqat.kernels._min_max import reduce_min_max, reduce_partials, update_min_max
from divqat.kernels._qparams import symmetric_zero_point, update_qparams
from divqat.kernels.fake_quantize import offsets, quantize, quantize_tile
from divqat.kernels.observe import BUFFERS, contiguous_buffers, observe_dense
from torch import Tensor


@triton.jit
def _delayed(
    x,
    y,
    mask,
    running_min,
    running_max,
    scale,
    zero_point,
    partial,  # [programs, 1, 2]
    counters,
    n,
    quant_min: tl.float32,
    quant_max: tl.float32,
    averaging_constant: tl.float32,
    SYMMETRIC: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s, z = tl.load(scale), tl.load(zero_point)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for tile in range(tl.program_id(0), ceil_div(n, BLOCK), tl.num_programs(0)):
        i = offsets(tile, BLOCK, WIDE)
        value = quantize_tile(
            x, y, mask, tile, i, n, s, z, quant_min, quant_max, True, True, RELU, BLOCK
        )
        low, high = update_min_max(low, high, value, value, i < n)
    lowest, highest = reduce_min_max(low, high, 0)
    c = tl.arange(0, 1)
    # The last program updates the buffers; all others have read them by then.
    write_partial(partial, tl.program_id(0), 1, c, lowest, highest)
    if is_last_program(counters, tl.num_programs(0)):
        least, most = reduce_partials(partial, tl.num_programs(0), 1, c, 1)
        update_qparams(
            least, most, running_min, running_max, scale, zero_point, c, 1, quant_min,
            quant_max, averaging_constant, False, SYMMETRIC, ZERO_POINT, RELU,
        )  # fmt: skip


def _quantize_delayed(
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    buffers: tuple[Tensor, ...],
    quant_min: int,
    quant_max: int,
    averaging_constant: float,
    symmetric: bool,
    relu: bool,
) -> None:
    """Per tensor, in one launch."""
    check_values(x, 1, **dict(zip(BUFFERS, buffers, strict=True)))
    n = x.numel()
    meta = block_of(n, x.element_size())
    programs = min(triton.cdiv(n, meta["BLOCK"]), resident_programs(x.device))
    partial = x.new_empty(2 * programs, dtype=torch.float32)
    launch(
        _delayed, (programs,), x.device, x, y, mask, *buffers, partial, counters(x.device), n,
        float(quant_min), float(quant_max), float(averaging_constant), SYMMETRIC=symmetric,
        ZERO_POINT=symmetric_zero_point(quant_min, quant_max), RELU=relu, WIDE=n > WIDE, **meta,
    )  # fmt: skip


def fake_quantize_observed(
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
    observer_mode: str,
    relu: bool,
    *,
    y: Tensor | None = None,  # x itself, to overwrite it; x is dense then
) -> tuple[Tensor, Tensor]:
    if observer_mode not in ("exact", "delayed", "frozen"):
        raise ValueError(f"observer_mode: wanted exact, delayed or frozen, got {observer_mode}")
    if y is None:
        x, y = dense(x)
    elif observer_mode == "delayed" and ch_axis is not None:
        x = x.clone()  # it is observed after y is written
    mask = empty_mask(x)
    options = (averaging_constant, symmetric, relu)
    with contiguous_buffers(running_min, running_max, scale, zero_point) as buffers:
        if observer_mode == "delayed" and ch_axis is None and x.numel() > 0:
            _quantize_delayed(x, y, mask, buffers, quant_min, quant_max, *options)
            return y, mask
        observe_options = (quant_min, quant_max, ch_axis, *options)
        if observer_mode == "exact":
            observe_dense(x, buffers, *observe_options)
        quantize(
            x, y, mask, *buffers[2:], quant_min, quant_max, ch_axis, relu=relu,
            reverse=observer_mode == "exact",
        )  # fmt: skip
        if observer_mode == "delayed":
            observe_dense(x, buffers, *observe_options)
    return y, mask


def fake_quantize_observed_inplace(x: Tensor, *args: Any) -> Tensor:
    """Overwrites x with y; returns the mask."""
    if x.stride() != torch.empty_like(x, device="meta").stride():
        raise ValueError(
            f"x: wanted dense memory to write over, got {list(x.shape)} with strides {x.stride()}"
        )
    return fake_quantize_observed(x, *args, y=x)[1]
