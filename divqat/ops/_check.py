"""Checks of arguments: each error names the argument, what was wanted and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_float(name: str, x: Tensor) -> None:
    """``x`` is a real floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted float32, float64, bfloat16 or float16, got {x.dtype}")


def check_overwritable(name: str, x: Tensor) -> None:
    """``x`` can be written over: as a whole, and without autograd losing a value that it needs."""
    if x.stride() != torch.empty_like(x, device="meta").stride():
        raise ValueError(
            f"{name}: wanted dense memory to write over, got {list(x.shape)} with strides "
            f"{list(x.stride())}"
        )
    if x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: wanted a result to write over, got a leaf that requires grad")


def check_range(quant_min: int, quant_max: int) -> None:
    """``quant_min < quant_max``, both exact in float32."""
    if not quant_min < quant_max:
        raise ValueError(
            f"quant_min, quant_max: wanted quant_min < quant_max, got {quant_min}, {quant_max}"
        )
    if max(abs(quant_min), abs(quant_max)) > 2**23:
        raise ValueError(
            f"quant_min, quant_max: wanted at most 24 bits, got {quant_min}, {quant_max}"
        )


def check_axis(x: Tensor, ch_axis: int | None, name: str = "x") -> int | None:
    """``ch_axis`` as a non-negative axis of ``x``, or None for one scale per tensor."""
    if ch_axis is None:
        return None
    if not -x.dim() <= ch_axis < x.dim():
        raise IndexError(f"ch_axis: wanted an axis of {name} with {x.dim()} dims, got {ch_axis}")
    return ch_axis % x.dim()


def check_qparam(
    name: str, value: Tensor, x: Tensor, ch_axis: int | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """``value`` is a per-tensor ``[]`` or ``[1]``, or per-channel ``[C]`` tensor beside ``x``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: wanted {wanted}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: wanted it on {x.device} like x, got {value.device}")
    if ch_axis is None:
        if value.dim() > 1 or value.numel() != 1:
            raise ValueError(f"{name}: wanted shape [] for one tensor, got {list(value.shape)}")
    elif list(value.shape) != [x.shape[ch_axis]]:
        raise ValueError(
            f"{name}: wanted shape [{x.shape[ch_axis]}] for axis {ch_axis} of x "
            f"{list(x.shape)}, got {list(value.shape)}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value!r}")
