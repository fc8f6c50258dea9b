"""Functions that a setting names: ``module:function``.

To import a module is to run it. So settings that came from a file, which may be somebody else's,
name a function only where a person names it, too: on the command line, or in :func:`trust`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

FOREIGN = "module:function"
_trusted: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())


def is_foreign(name: object) -> bool:
    """Whether a name is ``module:function``."""
    if not isinstance(name, str):
        return False
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))


@contextmanager
def trust(*names: str) -> Iterator[None]:
    """A block in which run folders, jobs and studies may name these functions.

    Raises:
        ValueError: a name is no ``module:function``.
    """
    for name in names:
        if not is_foreign(name):
            raise ValueError(f"trust: wanted {FOREIGN}, got {name!r}")
    before = _trusted.set(_trusted.get() | {*names})
    try:
        yield
    finally:
        _trusted.reset(before)


def trusted() -> tuple[str, ...]:
    """What :func:`trust` was told, around here."""
    return tuple(sorted(_trusted.get()))


def check_trusted(name: object) -> None:
    """Refuse a ``module:function`` from a file that nobody here has named; other values pass.

    Raises:
        ValueError: it says what would be imported. Nothing has been.
    """
    if not is_foreign(name) or name in _trusted.get():
        return
    module = str(name).partition(":")[0].partition(".")[0]
    # Not importlib.util.find_spec: of a.b it imports a.
    spec = importlib.machinery.PathFinder.find_spec(module, [*sys.path, os.getcwd()])
    place = spec.origin or "a folder" if spec else "not found"
    raise ValueError(
        f"{name} is code, which would be imported: the module {module} ({place}); if you trust it, "
        f"name it yourself: --trust {name}, in Python: with divqat.trust({name!r})"
    )


def foreign(name: str) -> Any:
    """What ``module:function`` names; the module is imported, from the current folder or wherever
    Python finds it.

    Raises:
        ImportError: there is no such module, or nothing of that name in it.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` has it
        sys.path.append(here)
    found = getattr(importlib.import_module(module), function, None)
    if found is None:
        raise ImportError(f"there is no {function} in the module {module}")
    return found
