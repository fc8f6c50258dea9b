"""DivQAT: quantization-aware training that makes int8 CNNs hard to extract (arXiv 2512.23948)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

# An installed package contains kernels/ as divqat.kernels; in a checkout that is not installed, the
# folder is beside this one.
_kernels = Path(__file__).parent.parent / "kernels"
if importlib.util.find_spec("divqat.kernels") is None and (_kernels.parent / "setup.py").is_file():
    _spec = importlib.util.spec_from_file_location(
        "divqat.kernels", _kernels / "__init__.py", submodule_search_locations=[str(_kernels)]
    )
    assert _spec is not None and _spec.loader is not None
    kernels = sys.modules["divqat.kernels"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

from divqat import nn, ops  # noqa: E402
from divqat._util.foreign import trust  # noqa: E402
from divqat._util.version import __version__  # noqa: E402
from divqat.export.summary import summary  # noqa: E402
from divqat.quantize import (  # noqa: E402
    QuantConfig,
    convert,
    freeze_batchnorm,
    freeze_observers,
    mixed_precision,
    prepare,
    preset,
    ptq,
    sensitivity,
)

__all__ = [
    "QuantConfig",
    "__version__",
    "convert",
    "freeze_batchnorm",
    "freeze_observers",
    "mixed_precision",
    "nn",
    "ops",
    "prepare",
    "preset",
    "ptq",
    "sensitivity",
    "summary",
    "trust",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """``divqat.zoo`` when it is asked for: it needs what trains, and most users do not need it."""
    if name == "zoo":
        return importlib.import_module("divqat.zoo")
    raise AttributeError(f"module 'divqat' has no attribute {name!r}")
