"""The Triton kernels, divqat.kernels: availability and registration with the dispatcher.

They are registered as plain kernels under divqat's own schemas rather than as ``triton_op``s. A
``triton_op`` can be traced but gives Inductor nothing to fuse, costs several times the host time,
and does not allow ops that update buffers in place. To ``torch.compile`` an op remains one opaque
call without a graph break.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def missing(device: str) -> str:
    """The reason why Triton's kernels cannot serve a device; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cpu":
        return "" if interpreted() else "Triton runs on a CPU only under TRITON_INTERPRET=1"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return ""


def module_of(name: str) -> str:
    """The module in kernels/ that has an op."""
    return name.removesuffix("_backward").removesuffix("_inplace")


@functools.cache
def launcher(name: str) -> Callable[..., Any]:
    """The function in kernels/ that serves an op; imports the module, and thereby triton."""
    return getattr(importlib.import_module(f"divqat.kernels.{module_of(name)}"), name)


class Registration:
    """Registration of the Triton kernels for a device; undone by :meth:`remove`."""

    def __init__(self, device: str) -> None:
        from divqat.ops._library import SCHEMAS

        self._library: Any = torch.library.Library("divqat", "IMPL")
        for name in SCHEMAS:
            # imported at the first call
            kernel = lambda *args, name=name: launcher(name)(*args)  # noqa: E731
            self._library.impl(name, torch.no_grad()(kernel), device.upper())

    def remove(self) -> None:
        self._library._destroy()
