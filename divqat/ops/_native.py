"""The compiled extension divqat._C: loading and description."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from divqat.ops._architectures import capabilities, covers

HOW_TO_BUILD = "DIVQAT_BUILD=cpu pip install --no-build-isolation . says what is missing"


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it is missing."""
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


def missing(device: str) -> str:
    """The reason why there are no native kernels for a device; empty if there are."""
    if extension is None:
        return _missing
    if device == "cuda" and extension.cuda_version is None:
        return "the extension divqat._C is built without CUDA"
    gpus = capabilities() if device == "cuda" else ()
    # One of several GPUs is enough: on the others, CUDA says that there is no code for them.
    if gpus and not any(covers(extension.cuda_architectures, gpu) for gpu in gpus):
        here = ", ".join(sorted({f"{major}.{minor}" for major, minor in gpus}))
        return (
            f"the extension divqat._C is built for GPUs of compute capability "
            f"{extension.cuda_architectures}, and this one has {here}"
        )
    return ""


def describe() -> dict[str, str]:
    """One line per device: its compiled kernels, or the reason why there are none."""
    lines = {device: f"none: {missing(device)}" for device in ("cpu", "cuda")}
    if extension is not None:
        sets = ", ".join(extension.instruction_sets())
        lines["cpu"] = f"{extension.instruction_set()} (this machine runs {sets})"
        if not missing("cuda"):
            lines["cuda"] = f"CUDA {extension.cuda_version} for {extension.cuda_architectures}"
    return lines
