"""Functions that a setting names: ``module:function``.

Importing a module runs its code. So a setting from a file, which may be untrusted, may name a
function only if the user names it, too: on the command line, or with :func:`trust`.
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
        ValueError: a name is not ``module:function``.
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
    """The names that are trusted in the current context, sorted."""
    return tuple(sorted(_trusted.get()))


def check_trusted(name: object) -> None:
    """Check that a ``module:function`` from a file is trusted; other values pass.

    Raises:
        ValueError: it is not trusted; the message says what would be imported. Nothing has been
            imported.
    """
    if not is_foreign(name) or name in _trusted.get():
        return
    module = str(name).partition(":")[0].partition(".")[0]
    # Not importlib.util.find_spec, which imports a for a.b.
    spec = importlib.machinery.PathFinder.find_spec(module, [*sys.path, os.getcwd()])
    origin = spec.origin or "a folder" if spec else "not found"
    raise ValueError(
        f"{name} is code, which would be imported: the module {module} ({origin}); if you trust "
        f"it, name it yourself: --trust {name}, in Python: with divqat.trust({name!r})"
    )


def foreign(name: str) -> Any:
    """Import the object ``module:function``, from Python's path or the current folder.

    Raises:
        ImportError: there is no such module, or no such name in it.
    """
    module, _, function = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:  # as with `python -m`
        sys.path.append(folder)
    value = getattr(importlib.import_module(module), function, None)
    if value is None:
        raise ImportError(f"there is no {function} in the module {module}")
    return value
