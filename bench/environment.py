"""The environment of a result, for reproduction."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from divqat._util.devices import hardware, versions
from divqat.ops import native_kernels

PEERS = ("torchao", "brevitas", "liger-kernel")  # for comparison only, not required
SAME = ("commit", "hardware", "system", "threads", "versions", "native_kernels", "gpu")


def environment(command: str) -> dict[str, Any]:
    """Command, commit, versions, hardware, date; ``gpu`` is None if there is none."""
    return {
        "command": command,
        "commit": os.environ.get("DIVQAT_COMMIT") or _commit() or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": versions() | {name: _version(name) for name in PEERS},
        "native_kernels": native_kernels(),
        "gpu": _gpu() if torch.cuda.is_available() else None,
    }


def _commit() -> str:
    """The commit of these sources; empty where they have no history, or git is missing."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties("cuda")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except FileNotFoundError:
        driver = "unknown"
    return {
        "name": properties.name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "memory": properties.total_memory,
    }
