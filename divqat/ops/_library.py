"""Schemas of the ops, and registration of their references.

The schemas are declared in Python, so that every op exists on every machine. The PyTorch reference
of an op is registered as ``CompositeExplicitAutograd`` and serves all devices; the dispatcher
prefers a C++ or Triton kernel that is registered for CPU or CUDA.

To a compiler each op is one opaque call. :func:`op` can return the references themselves instead:
calls of PyTorch's own ops, which a compiler can trace and Inductor can fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from divqat.ops._check import check_buffers, check_device

# Masks are uint8 [ceil(numel / 8)]: bit i of byte j belongs to element 8j + i in the memory order
# of the dense output, so a mask fits any layout.
SCHEMAS = {
    "fake_quantize": "(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
    "int? ch_axis, bool propagate_nan) -> (Tensor y, Tensor mask)",
    "fake_quantize_backward": "(Tensor grad_y, Tensor mask) -> Tensor",
    "observe": "(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) scale, "
    "Tensor(d!) zero_point, int quant_min, int quant_max, int? ch_axis, float averaging_constant, "
    "bool symmetric, bool relu) -> ()",
    "fake_quantize_observed": "(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, "
    "Tensor(c!) scale, Tensor(d!) zero_point, int quant_min, int quant_max, int? ch_axis, "
    "float averaging_constant, bool symmetric, str observer_mode, bool relu) "
    "-> (Tensor y, Tensor mask)",
    # Overwrites x, which must be dense, with y; returns the mask.
    "fake_quantize_observed_inplace": "(Tensor(a!) x, Tensor(b!) running_min, "
    "Tensor(c!) running_max, Tensor(d!) scale, Tensor(e!) zero_point, int quant_min, "
    "int quant_max, int? ch_axis, float averaging_constant, bool symmetric, str observer_mode, "
    "bool relu) -> Tensor",
    "fake_quantize_lsq": "(Tensor x, Tensor scale, Tensor zero_point, int quant_min, "
    "int quant_max, int? ch_axis) -> Tensor",
    "fake_quantize_lsq_backward": "(Tensor grad_y, Tensor x, Tensor scale, Tensor zero_point, "
    "int quant_min, int quant_max, int? ch_axis, float grad_factor) "
    "-> (Tensor grad_x, Tensor grad_scale, Tensor grad_zero_point)",
    "fake_quantize_weights": "(Tensor[] weights, int quant_min, int quant_max, int? ch_axis) "
    "-> Tensor[]",
    "fake_quantize_weights_backward": "(Tensor[] grads, Tensor[] weights, int quant_min, "
    "int quant_max, int? ch_axis) -> Tensor[]",
    "divergence_loss": "(Tensor logits, Tensor teacher_logits, Tensor target, Tensor weight, "
    "float temperature, str direction, str classes, float? bound, bool guard, "
    "float label_smoothing, int ignore_index) "
    "-> (Tensor loss, Tensor ce, Tensor divergence, Tensor grad_logits)",
    "divergence_loss_backward": "(Tensor(a!) grad_logits, Tensor grad_output) -> ()",
}

_library = torch.library.Library("divqat", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=_TAGS)


# Whether op() returns the reference. A plain global: Dynamo guards on it and recompiles when it
# changes.
traceable = False
_references: dict[str, Callable[..., Any]] = {}


def op(name: str) -> Callable[..., Any]:
    """The function that an autograd.Function calls: the dispatcher's op, or its reference if
    ``traceable``.

    Both have the same arguments and results, except that the masks of references are bool tensors.
    """
    return _references[name] if traceable else getattr(torch.ops.divqat, name)


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    packed: Callable[..., Any] | None = None,
) -> None:
    """Register the PyTorch reference of an op for every device, and its fake kernel.

    ``packed`` is the reference with a packed mask, as in the schema, if the op returns a mask.
    """
    _references[name] = reference
    # The autograd.Function defines the gradient: inside the kernel autograd is off.
    kernel = _guarded(name, torch.no_grad()(packed or reference))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"divqat::{name}", _guarded(name, fake), lib=_library)


def _guarded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an op, with checks that all arguments are on one device and can be updated.

    If one argument is on ``meta``, the dispatcher calls the fake kernel even if others are not,
    which would return uninitialized memory.
    """
    arguments = getattr(torch.ops.divqat, name).default._schema.arguments

    def guarded(*args: Any) -> Any:
        first = None
        for argument, value in zip(arguments, args, strict=True):
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(x, Tensor):
                    continue
                first = first or (argument.name, x.device)
                check_device(argument.name, x, first[1], first[0])
                if argument.alias_info is not None and argument.alias_info.is_write:
                    check_buffers(**{argument.name: x})
        return kernel(*args)

    return guarded
