"""What is changed in torch while a forward is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import fx, nn
from torch.utils import checkpoint

from divqat.quantize.tracing.recorded import Recorded, has_proxy

if TYPE_CHECKING:
    from divqat.quantize.tracing.recorder import Recorder

# Functions whose arguments torch parses before it looks for proxies.
FACTORIES = ("zeros", "ones", "empty", "full", "arange", "tensor")
# Functions that are recorded without proxies among their arguments, too.
RANDOM = ("rand", "randn", "randint", "randperm", "normal")


@contextmanager
def patched(recorder: Recorder, attributes: dict[str, fx.Proxy]) -> Iterator[None]:
    """A block in which calls of modules, functions of sizes and autograd functions, and reads of
    tensors of modules, go to ``recorder``.

    Args:
        attributes: proxies of the tensors that were read.
    """
    call, get = nn.Module.__call__, nn.Module.__getattr__

    def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Another thread may call a model of its own meanwhile.
        foreign = module not in recorder.paths and not has_proxy((args, kwargs))
        if recorder.evaluating or foreign:
            return call(module, *args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return call(module, *args, **kwargs)

        return recorder.call_module(module, forward, args, kwargs)

    def get_attribute(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        return value if recorder.evaluating else recorder.getattr(name, value, attributes)

    def factory(function: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            random = function.__name__ in RANDOM
            if recorder.evaluating or not (random or has_proxy((args, kwargs))):
                return function(*args, **kwargs)
            return recorder.create_proxy("call_function", function, args, kwargs)

        return create

    applied = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.evaluating or not has_proxy((args, kwargs)):
            return applied(cls, *args, **kwargs)
        if cls is checkpoint.CheckpointFunction:  # of the function and a flag
            recorder.lose("activation checkpointing")
            return args[0](*args[2:])
        name = f"functions.{cls.__name__}"
        recorder.added[name] = Applied(cls)
        return recorder.create_proxy("call_module", name, args, kwargs)

    factories = {name: factory(getattr(torch, name)) for name in (*FACTORIES, *RANDOM)}
    finfo = torch.finfo
    factories["finfo"] = lambda dtype: finfo(_value(dtype))
    with (
        mock.patch.object(nn.Module, "__call__", call_module),
        mock.patch.object(nn.Module, "__getattr__", get_attribute),
        mock.patch.multiple(torch, **factories),  # type: ignore[call-overload]
        mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)),
        _regions(recorder),
    ):
        yield


@contextmanager
def _regions(recorder: Recorder) -> Iterator[None]:
    """A block in which regions that a graph does not keep are noted."""
    enter, init = torch.autocast.__enter__, torch.autocast.__init__

    def init_autocast(region: torch.autocast, *args: Any, **kwargs: Any) -> None:
        init(region, *map(_value, args), **{key: _value(item) for key, item in kwargs.items()})

    def enter_autocast(region: torch.autocast) -> Any:
        if not recorder.evaluating:
            recorder.lose("the autocast region")
        return enter(region)

    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        recorder.lose("activation checkpointing")
        yield

    with (
        mock.patch.object(torch.autocast, "__init__", init_autocast),
        mock.patch.object(torch.autocast, "__enter__", enter_autocast),
        # torch.utils.checkpoint calls the function between the two halves of a generator
        mock.patch.object(checkpoint, "_checkpoint_without_reentrant_generator", nothing),
    ):
        yield


def _value(item: Any) -> Any:
    """The value of a proxy on the example."""
    return item.node.meta["value"] if type(item) is Recorded else item


class Applied(nn.Module):
    """Applies an autograd function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function of the arguments."""
        return self.function.apply(*args, **kwargs)
