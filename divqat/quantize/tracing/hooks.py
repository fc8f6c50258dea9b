"""Forward hooks of modules that tracing takes apart."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn


def has_other_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that only a call of it runs: of its backward, or of keyword
    arguments."""
    of_keywords = module._forward_hooks_with_kwargs or module._forward_pre_hooks_with_kwargs
    return bool(of_keywords or module._backward_hooks or module._backward_pre_hooks)


def move_hooks(old: nn.Module, new: nn.Module, kinds: tuple[str, ...] = ()) -> None:
    """Let ``new`` run hooks of ``old`` instead of it. Their handles still remove them.

    Args:
        kinds: names of the dictionaries of hooks; (): all of the forward and the backward pass.
    """
    for name in kinds or [name for name in vars(old) if name.startswith(("_forward", "_backward"))]:
        hooks = getattr(old, name)
        if isinstance(hooks, OrderedDict):
            object.__setattr__(new, name, hooks)
            object.__setattr__(old, name, OrderedDict())


class PreHooks(nn.Module):
    """Runs the forward pre-hooks of a module; returns the arguments of its call.

    Args:
        module: it is not a submodule of this one.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = (module,)  # in a tuple, so that it is not a submodule

    def forward(self, *args: Any) -> Any:
        (module,) = self.module
        for hook in module._forward_pre_hooks.values():
            result = hook(module, args)
            if result is not None:
                args = result if isinstance(result, tuple) else (result,)
        return args


class PostHooks(PreHooks):
    """Runs the forward hooks of a module; returns its result."""

    def forward(self, args: Any, result: Any) -> Any:
        (module,) = self.module
        for hook in module._forward_hooks.values():
            changed = hook(module, args, result)
            if changed is not None:
                result = changed
        return result
