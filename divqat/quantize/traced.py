"""A traced model that keeps what prepare gave it when it is pickled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx, nn

from divqat.quantize.group_weights import group_weights, grouped_by
from divqat.quantize.swap import float_layers


class PreparedModule(fx.GraphModule):
    """What :func:`divqat.prepare` makes of a model that it can trace.

    A pickled GraphModule is traced again and comes back as a plain one without hooks: float
    checkpoints would no longer load, and weights no longer be quantized together. Its modules come
    in the order of their calls, and an average of it and its twin would mix up their buffers.
    ``meta`` holds the float layers that it was prepared with, as what is put in later stays in
    float.
    """

    def remember_float_layers(self) -> None:
        """Take the layers that are in float now for meant to be."""
        self.meta["float_layers"] = float_layers(self)

    def new_float_layers(self) -> list[str]:
        """Those that have come since, with their types."""
        known = self.meta["float_layers"]
        return [f"{name} ({of})" for name, of in float_layers(self) if (name, of) not in known]

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = super().__reduce__()
        order = {name: list(module._modules) for name, module in self.named_modules()}
        kept = self.meta, self._load_state_dict_pre_hooks, grouped_by(self), order
        return _unpickled, (rebuild, arguments, *kept)


def _unpickled(
    rebuild: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    meta: dict[str, Any],
    pre_hooks: Any,
    bucket_mb: float | None,
    order: dict[str, list[str]],
) -> PreparedModule:
    plain = rebuild(*arguments)
    model = PreparedModule(plain, plain.graph, type(plain).__name__)
    for name, module in model.named_modules():
        module._modules = {child: module._modules[child] for child in order[name]}
    model.meta, model._load_state_dict_pre_hooks = meta, pre_hooks
    return model if bucket_mb is None else group_weights(model, bucket_mb)  # type: ignore[return-value]


def accept_float_keys(model: nn.Module, renamed: dict[str, str], unused: set[str]) -> None:
    """Let a float checkpoint of the model that was traced load into ``model``.

    Args:
        model: loads the checkpoint.
        renamed: the prefix of each BatchNorm's keys, and what it is inside its fused layer.
        unused: keys of modules that the forward does not use (tracing drops them).
    """
    model.register_load_state_dict_pre_hook(partial(_adapt_float_keys, renamed, unused))


def _adapt_float_keys(
    renamed: dict[str, str],
    unused: set[str],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    for key in unused:
        state_dict.pop(prefix + key, None)
    for key in list(state_dict):
        for old, new in renamed.items():
            if key.startswith(prefix + old):
                state_dict[prefix + new + key[len(prefix + old) :]] = state_dict.pop(key)
