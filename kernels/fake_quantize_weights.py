"""fake_quantize_weights: every row of every weight, one launch forward and one backward.

The addresses are arguments of the kernel and the shapes its constants (one compilation per model):
there is no copy to the device, and a captured graph keeps its own list. A program reads its row for
the largest magnitude, then again, from L1 or L2, to quantize it; 8 bytes per float32 element, 12 in
the backward.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from divqat.kernels._launch import channels_of, check_same, dense, empty_mask, laid_out_as, launch
from divqat.kernels._math import cast, clamp, compute
from divqat.kernels._qparams import round_to_code, symmetric_scale
from divqat.kernels.fake_quantize import masked_grad, quantize
from divqat.kernels.observe import observe_dense
from torch import Tensor

# Three addresses each; a kernel's parameters may take 4 KB.
WEIGHTS_PER_LAUNCH = 128


@triton.jit
def _quantize_row(
    row,  # address of the row, like the next two
    grad,
    out,
    groups,
    quant_min,
    quant_max,
    ALIGN: tl.constexpr,  # columns of a group, and divisor of the addresses: 16 or 1
    BACKWARD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The hint must be here: one on the argument of an inlined function is lost.
    pointer: tl.constexpr = tl.pointer_type(DTYPE)
    row = tl.multiple_of(row.to(pointer), ALIGN)
    grad = tl.multiple_of(grad.to(pointer), ALIGN)
    out = tl.multiple_of(out.to(pointer), ALIGN)
    columns = groups * ALIGN
    k = tl.arange(0, BLOCK)
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    amax = tl.full([BLOCK], 0, A)
    bad = tl.full([BLOCK], 0, tl.int1)
    for first in range(0, columns, BLOCK):
        size = tl.abs(compute(tl.load(row + first + k, first + k < columns, other=0.0)))
        bad = bad | (size != size)
        amax = tl.maximum(amax, tl.where(size != size, 0.0, size))
    most = tl.where(tl.max(bad.to(tl.int32), 0) > 0, float("nan"), tl.max(amax, 0)).to(tl.float32)
    scale = symmetric_scale(-most, most, quant_min, quant_max)
    for first in range(0, columns, BLOCK):
        here = first + k < columns
        # q = clamp(nearbyint(w · (1/scale))), zero point 0
        value = compute(tl.load(row + first + k, here, other=0.0))
        rounded, _ = round_to_code(value, scale, tl.full([1], 0, tl.int32))
        q = clamp(rounded, quant_min, quant_max)
        if BACKWARD:
            given = tl.load(grad + first + k, here, other=0.0)
            tl.store(out + first + k, tl.where(rounded == q, given, 0.0).to(DTYPE), here)
        else:
            tl.store(out + first + k, cast(q * scale.to(A), DTYPE), here)


@triton.jit
def _quantize_weights(
    weights,  # tuple of addresses, like the next two
    grads,  # or None in the forward
    outputs,
    quant_min: tl.float32,
    quant_max: tl.float32,
    FIRST: tl.constexpr,  # index of each weight's first row among all rows
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    # Find the weight of this row with scalar selects instead of loads.
    weight, out, columns, begin = weights[0], outputs[0], COLUMNS[0], 0
    grad = weights[0] if grads is None else grads[0]
    for j in tl.static_range(1, len(FIRST)):
        mine = program >= FIRST[j]
        weight, out = tl.where(mine, weights[j], weight), tl.where(mine, outputs[j], out)
        columns, begin = tl.where(mine, COLUMNS[j], columns), tl.where(mine, FIRST[j], begin)
        if grads is not None:
            grad = tl.where(mine, grads[j], grad)
    at = (program - begin).to(tl.int64) * columns * (DTYPE.primitive_bitwidth // 8)
    # 16-byte accesses if every row is aligned
    if (columns % 16 == 0) & ((weight | out | grad) % 16 == 0):
        _quantize_row(
            weight + at, grad + at, out + at, columns // 16, quant_min, quant_max, 16,
            grads is not None, DTYPE, BLOCK,
        )  # fmt: skip
    else:
        _quantize_row(
            weight + at, grad + at, out + at, columns, quant_min, quant_max, 1,
            grads is not None, DTYPE, BLOCK,
        )  # fmt: skip


_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class _WeightRows(NamedTuple):
    """A weight with contiguous rows, by its addresses (grad is 0 in the forward)."""

    weight: int
    grad: int
    out: int
    rows: int
    columns: int


def _launch_rows(
    device: torch.device,
    dtype: torch.dtype,
    group: list[_WeightRows],
    quant_min: int,
    quant_max: int,
    backward: bool,
) -> None:
    """One launch for weights of one dtype."""
    weights, grads, outputs, rows, columns = zip(*group, strict=True)
    first = tuple(itertools.accumulate(rows, initial=0))
    launch(
        _quantize_weights, (first[-1],), device, weights, grads if backward else None, outputs,
        float(quant_min), float(quant_max), FIRST=first[:-1], COLUMNS=columns,
        DTYPE=_DTYPES[dtype], BLOCK=1024, num_warps=4,
    )  # fmt: skip


def _quantize_weight(
    w: Tensor, grad: Tensor | None, y: Tensor, quant_min: int, quant_max: int, ch_axis: int | None
) -> None:
    """A weight with one scale, or with rows that are not contiguous: a launch for the scales, one
    to quantize, and in the backward one for the gradient."""
    scale = w.new_empty(channels_of(w, ch_axis)[0], dtype=torch.float32)
    zero_point = torch.empty_like(scale, dtype=torch.int32)
    observe_dense(w, (None, None, scale, zero_point), quant_min, quant_max, ch_axis)
    mask = None if grad is None else empty_mask(w)
    quantize(w, y, mask, scale, zero_point, quant_min, quant_max, ch_axis)
    if grad is not None and mask is not None:
        masked_grad(grad, mask, y)


def _run(
    weights: list[Tensor],
    grads: list[Tensor] | None,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
) -> list[Tensor]:
    if not weights:
        return []
    device = weights[0].device
    outputs, alive = [], []  # keeps dense copies alive until the launches
    groups: dict[torch.dtype, list[_WeightRows]] = defaultdict(list)
    for i, given in enumerate(weights):
        if given.device != device:
            raise ValueError(f"weights: wanted all on {device}, got one on {given.device}")
        w, y = dense(given)
        outputs.append(y)
        grad = None
        if grads is not None:
            check_same("grads", grads[i], given)
            grad = laid_out_as(grads[i], w)
        n = w.numel()
        if n == 0:
            continue
        axis = None if ch_axis is None else ch_axis % w.dim()
        # The axis is the outermost in memory: the rows are contiguous.
        if axis is not None and (rows := w.shape[axis]) * w.stride(axis) == n:
            address = 0 if grad is None else grad.data_ptr()
            groups[w.dtype].append(
                _WeightRows(w.data_ptr(), address, y.data_ptr(), rows, n // rows)
            )
            alive.append((w, grad))
        else:
            _quantize_weight(w, grad, y, quant_min, quant_max, axis)
    for dtype, group in groups.items():
        for first in range(0, len(group), WEIGHTS_PER_LAUNCH):
            part = group[first : first + WEIGHTS_PER_LAUNCH]
            _launch_rows(device, dtype, part, quant_min, quant_max, grads is not None)
    return outputs


def fake_quantize_weights(
    weights: list[Tensor], quant_min: int, quant_max: int, ch_axis: int | None
) -> list[Tensor]:
    return _run(weights, None, quant_min, quant_max, ch_axis)


def fake_quantize_weights_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
) -> list[Tensor]:
    if len(grads) != len(weights):
        raise ValueError(f"grads: wanted {len(weights)} like weights, got {len(grads)}")
    return _run(weights, grads, quant_min, quant_max, ch_axis)
