"""Proxies with values: what a forward sees while it is recorded."""

from __future__ import annotations

import linecache
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from divqat.quantize.tracing.recorder import Recorder

# Library code, in which no line is the user's.
LIBRARY = ("/torch/", "/divqat/", "/unittest/", "<eval_with_key>")


class Untraceable(Exception):
    """A model that does something that no graph can express."""


class Recorded(fx.Proxy):
    """A node and its value on the example, ``node.meta["value"]``."""

    tracer: Recorder

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.node.meta["value"], name)
        if callable(attribute) and not isinstance(attribute, (torch.dtype, torch.device)):
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The value's type, for ``isinstance``; type() tells the truth."""
        value = self.node.meta["value"]
        return type(value) if isinstance(value, (Tensor, int, float, str)) else Recorded

    def _number(self, kind: Callable[[Any], Any]) -> Any:
        value = self.node.meta["value"]
        if isinstance(value, Tensor):
            raise Untraceable(f"{user_line()} depends on the contents of a tensor")
        return kind(value)

    def __bool__(self) -> bool:
        return bool(self._number(bool))

    def __int__(self) -> int:
        return int(self._number(int))

    def __float__(self) -> float:
        return float(self._number(float))

    def __index__(self) -> int:
        return int(self._number(operator.index))

    def __len__(self) -> int:
        return len(self.node.meta["value"])

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # type: ignore[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __hash__(self) -> int:
        return id(self)


def _inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Recorded, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# fx turns ``x += y`` into ``x = x + y``, which other names of x would not see.
for _name in ("iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior"):
    setattr(Recorded, f"__{_name}__", _inplace(getattr(operator, _name)))


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) is not Recorded and isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif type(value) is not Recorded and isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def has_proxy(value: Any) -> bool:
    return any(type(leaf) is Recorded for leaf in _leaves(value))


def has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in _leaves(value))


def user_line() -> str:
    """The innermost line of code outside of libraries, as "file:line (code)"."""
    frame = sys._getframe(1)
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        if not any(part in name for part in LIBRARY):
            return f"{name}:{line} ({linecache.getline(name, line).strip()})"
        frame = frame.f_back  # type: ignore[assignment]
    return "the forward"
