"""A traced model that keeps its hooks and metadata when it is pickled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx, nn

from divqat.quantize.group_weights import group_weights, grouped_by
from divqat.quantize.swap import float_layers


class PreparedModule(fx.GraphModule):
    """The result of :func:`divqat.prepare` for a model that it can trace.

    Unpickling a GraphModule traces it again and returns a plain one without hooks: float
    checkpoints would no longer load, and weights would no longer be quantized together. The order
    of its modules would become that of their calls, and an average of it and the original would mix
    up their buffers. This class restores all of them. ``meta`` keeps the float layers at the time
    of ``prepare``, to detect layers that are added later.
    """

    def remember_float_layers(self) -> None:
        """Record the layers that are in float now."""
        self.meta["float_layers"] = float_layers(self)

    def new_float_layers(self) -> list[str]:
        """The float layers that were added since, with their types."""
        known = self.meta["float_layers"]
        return [
            f"{name} ({kind})" for name, kind in float_layers(self) if (name, kind) not in known
        ]

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
    """Let float checkpoints of the traced model load into ``model``.

    Args:
        model: the prepared model.
        renamed: the old prefix of each BatchNorm's keys, and the new one inside its fused layer.
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
