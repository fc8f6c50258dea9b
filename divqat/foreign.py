"""Functions that a setting names: ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

FOREIGN = "module:function"


def is_foreign(name: str) -> bool:
    """Whether a name is ``module:function``."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))


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
