"""Devices, threads, versions and hardware; digests of weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divqat._util.version import __version__


def find_device(name: str) -> torch.device:
    """The device ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` is cuda if available.

    Raises:
        ValueError: it is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: wanted an available one, got {name!r} ({reason})") from error
    return device


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """A block in which torch uses ``count`` CPU threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Versions of Python, divqat and the installed packages on which numbers depend."""
    result = {"python": platform.python_version(), "divqat": __version__}
    for name in ("torch", "triton", "numpy", "onnx", "onnxruntime"):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def hardware() -> str:
    """Processor, number of threads used by torch, and GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, f":{cpu}").partition(":")[2].strip()
    parts = [cpu, f"{torch.get_num_threads()} of {os.cpu_count()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def fingerprint(state: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that identify a state dict."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(key.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]
