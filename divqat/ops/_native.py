"""The compiled extension divqat._C: loading it and putting its kernels into the dispatcher."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("native", "torch")
HOW_TO_BUILD = "DIVQAT_BUILD=cpu pip install --no-build-isolation . says what is missing"


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why it is not there."""
    if importlib.util.find_spec("divqat._C") is None:
        return None, f"the extension divqat._C is not built ({HOW_TO_BUILD})"
    try:
        extension = importlib.import_module("divqat._C")
    except ImportError as error:  # built for another torch or Python
        return None, f"the extension divqat._C cannot be loaded, build it again: {error}"
    built, running = extension.torch_version, torch.__version__.partition("+")[0]
    if built.split(".")[:2] != running.split(".")[:2]:
        return None, f"the extension divqat._C is built for torch {built}, not {running}"
    return extension, ""


extension, _missing = _load()
# What is in the dispatcher now: device → registration, which lives as long as it is kept.
_registered: dict[str, Any] = {}


def missing(device: str) -> str:
    """Why there are no native kernels for a device, empty where there are."""
    if extension is None:
        return _missing
    if device == "cuda" and extension.cuda_version is None:
        return "the extension divqat._C is built without CUDA"
    return ""


def describe() -> dict[str, str]:
    """One line per device: which native kernels were built, or why there are none."""
    lines = {device: f"none: {missing(device)}" for device in ("cpu", "cuda")}
    if extension is not None:
        sets = ", ".join(extension.instruction_sets())
        lines["cpu"] = f"{extension.instruction_set()} (this machine runs {sets})"
        if extension.cuda_version is not None:
            lines["cuda"] = f"CUDA {extension.cuda_version} for {extension.cuda_architectures}"
    return lines


def use(backend: str) -> None:
    """Let ``"native"`` kernels or the ``"torch"`` references serve the ops from now on.

    Raises:
        ValueError: an unknown name. RuntimeError: there are no native kernels, and why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        for registration in _registered.values():
            registration.remove()
        _registered.clear()
        return
    if extension is None:
        raise RuntimeError(f"backend: wanted native, but {_missing}")
    for device in ("cpu", "cuda"):
        if device not in _registered and not missing(device):
            _registered[device] = extension.Registration(device)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve the ops with ``"native"`` kernels or the ``"torch"`` references inside the block.

    The choice holds for the whole process, all threads. ``DIVQAT_BACKEND`` makes it for a run.

    Raises:
        ValueError: an unknown name. RuntimeError: there are no native kernels, and why.
    """
    before = "native" if _registered else "torch"
    use(name)
    try:
        yield
    finally:
        use(before)


def start() -> None:
    """Take ``DIVQAT_BACKEND``, or native kernels where there are some."""
    default = "torch" if extension is None else "native"
    use(os.environ.get("DIVQAT_BACKEND") or default)
