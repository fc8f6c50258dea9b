"""Checks of arguments: each error names the argument, what was wanted and what it got."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT32 = torch.finfo(torch.float32)


def check_untransformed(op: str) -> None:
    """Check that no transform of ``torch.func`` is active: they do not support these ops."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op}: wanted a call outside of torch.func and vmap, which it does not support "
            "(torch.autograd differentiates it, and a batch is a dimension of x), got one inside"
        )


def check_tensor(name: str, x: object) -> None:
    """Check that ``x`` is a strided tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: wanted torch.strided, got {x.layout}")


def check_float(name: str, x: Tensor) -> None:
    """Check that ``x`` is a real floating-point tensor."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted float32, float64, bfloat16 or float16, got {x.dtype}")


def check_device(name: str, value: Tensor, device: torch.device, like: str = "x") -> None:
    """Check that ``value`` is on ``device``, the device of the argument ``like``."""
    if value.device != device:
        raise ValueError(f"{name}: wanted it on {device} like {like}, got {value.device}")


def check_number(name: str, value: object) -> None:
    """Check that ``value`` is a real number."""
    if not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name}: wanted a number, got {value!r}")


def check_integer(name: str, value: object) -> None:
    """Check that ``value`` is an integer."""
    if not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: wanted an integer, got {value!r}")


def check_flags(**flags: object) -> None:
    """Check that all flags are bools."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: wanted True or False, got {value!r}")


def check_overwritable(name: str, x: Tensor) -> None:
    """Check that ``x`` is dense and can be overwritten without loss of a value for autograd."""
    if x.stride() != torch.empty_like(x, device="meta").stride():
        raise ValueError(
            f"{name}: wanted dense memory to write over, got {list(x.shape)} with strides "
            f"{list(x.stride())}"
        )
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name}: wanted a tensor to update, got one made in inference mode")
    if not torch.is_grad_enabled():
        return
    # Autograd refuses these as well, but only after the memory was overwritten.
    if x.is_leaf and x.requires_grad:
        raise ValueError(f"{name}: wanted a result to overwrite, got a leaf that requires grad")
    base = x._base
    if base is None:
        return
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{name}: wanted a result to overwrite, got a view of a leaf that requires grad"
        )
    if torch._C._autograd._get_creation_meta(x) != torch._C._autograd.CreationMeta.DEFAULT:
        raise ValueError(
            f"{name}: wanted a result to overwrite, got a view that autograd does not track "
            "(one of several, or made under no_grad)"
        )


def check_buffers(**buffers: Tensor) -> None:
    """Check that all buffers, [] or [C], can be updated in place."""
    compiling = torch.compiler.is_compiling()
    for name, value in buffers.items():
        if value.dim() == 1 and value.stride(0) == 0 and value.shape[0] > 1:
            raise ValueError(
                f"{name}: wanted memory of its own for each value, got {list(value.shape)} with "
                f"strides {list(value.stride())}"
            )
        if not compiling and value.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name}: wanted a tensor to update, got one made in inference mode")


def check_range(quant_min: int, quant_max: int) -> None:
    """Check that ``quant_min < quant_max`` are integers and exact in float32."""
    check_integer("quant_min", quant_min)
    check_integer("quant_max", quant_max)
    if not quant_min < quant_max:
        raise ValueError(
            f"quant_min, quant_max: wanted quant_min < quant_max, got {quant_min}, {quant_max}"
        )
    if max(abs(quant_min), abs(quant_max)) > 2**23:
        raise ValueError(
            f"quant_min, quant_max: wanted at most 24 bits, got {quant_min}, {quant_max}"
        )


def check_axis(x: Tensor, ch_axis: int | None, name: str = "x") -> int | None:
    """``ch_axis`` as a non-negative axis of ``x``, or None for one scale per tensor.

    Raises:
        TypeError: it is not an integer.
        IndexError: it is not an axis of ``x``.
    """
    if ch_axis is None:
        return None
    check_integer("ch_axis", ch_axis)
    if not -x.dim() <= ch_axis < x.dim():
        raise IndexError(f"ch_axis: wanted an axis of {name} with {x.dim()} dims, got {ch_axis}")
    return ch_axis % x.dim()


def check_qparam(
    name: str, value: Tensor, x: Tensor, ch_axis: int | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check that ``value`` is a per-tensor ``[]`` or ``[1]``, or per-channel ``[C]`` tensor that
    fits ``x``.

    If ``x`` has no elements along ``ch_axis``, any number of channels fits.
    """
    check_tensor(name, value)
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: wanted {wanted}, got {value.dtype}")
    check_device(name, value, x.device)
    if ch_axis is None:
        if value.dim() > 1 or value.numel() != 1:
            raise ValueError(f"{name}: wanted shape [] for one tensor, got {list(value.shape)}")
    elif value.dim() != 1 or value.shape[0] != x.shape[ch_axis] != 0:
        raise ValueError(
            f"{name}: wanted shape [{x.shape[ch_axis]}] for axis {ch_axis} of x "
            f"{list(x.shape)}, got {list(value.shape)}"
        )


def readable(value: Tensor) -> bool:
    """Whether the values can be read without a host sync: on the CPU, outside of tracing."""
    return (
        not torch.compiler.is_compiling()
        and value.is_cpu
        and type(value) in (Tensor, nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def check_values(name: str, value: Tensor, low: float, high: float) -> None:
    """Check that all values of a :func:`readable` tensor are in [low, high]."""
    if value.numel() == 1:
        smallest = largest = value.item()
    elif value.numel() > 1:
        smallest, largest = (bound.item() for bound in value.detach().aminmax())
    else:
        return
    if not low <= smallest <= largest <= high:
        raise ValueError(
            f"{name}: wanted values in [{low:.8g}, {high:.8g}], got {smallest:.8g} to {largest:.8g}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value!r}")
