"""Dataclasses from untrusted JSON."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def made(cls: type[T], data: Mapping[str, Any]) -> T:
    """``cls(**data)``, with a check of the types of its fields: a string in place of a number, for
    example, would be repeated when multiplied.

    Raises:
        TypeError: a field has a wrong type, is missing or unknown; the message names it.
    """
    row = cls(**data)
    for name, kind in get_type_hints(cls).items():
        value = getattr(row, name)
        if not _is(value, kind):
            got = f"{type(value).__name__} {str(value)[:40]!r}"
            raise TypeError(f"{name}: wanted {getattr(kind, '__name__', kind)}, got {got}")
    return row


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is(value, member) for member in get_args(kind))
    inner = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, inner[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            _is(key, inner[0]) and _is(item, inner[1]) for key, item in value.items()
        )
    if kind is Any:
        return True
    if kind in (int, float):  # in the range of both
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)
