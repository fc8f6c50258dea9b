"""Clear errors for two common mistakes: an unknown name, and a missing extra."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def unknown_name(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for an unknown ``name`` of a ``what``; it suggests the nearest known one.

    Example:
        >>> str(unknown_name("model", "lennet", ["lenet", "resnet20"]))
        "unknown model 'lennet' (did you mean 'lenet'?); known: lenet, resnet20"
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


def require(module: str, extra: str) -> Any:
    """Import ``module``, an optional dependency of ``divqat[extra]``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is missing: pip install 'divqat[{extra}]' ({error})", name=module
        ) from error
