"""Timing that can be compared: contenders take turns, and the medians count."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def settle_allocator() -> None:
    """Let glibc keep freed memory of up to 64 MB instead of handing it back to the system.

    It adapts to the largest block freed so far, up to 32 MB; a training process has long freed one.
    Without this the first sizes measured would pay for fresh pages that the later ones do not.
    """
    del_me = torch.ones(31 * 2**18)
    del del_me


def interleaved(
    contenders: dict[str, Callable[[], object]], seconds: float = 2.0, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Run the contenders in turns, A B C A B C …, for about ``seconds`` each, at least 7 rounds.

    Returns:
        For each name ``median``, ``p20`` and ``p80`` in milliseconds, and the number of ``rounds``.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warmup):
        for function in contenders.values():
            function()
    deadline = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 7:
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> dict[str, float]:
    quintiles = statistics.quantiles(values, n=5)
    return {
        "median": statistics.median(values),
        "p20": quintiles[0],
        "p80": quintiles[3],
        "rounds": len(values),
    }


def environment(command: str) -> dict[str, Any]:
    """What a result needs to be made again: command, commit, versions, hardware, date."""
    from divqat.evaluate.result import hardware, versions
    from divqat.ops import native_kernels

    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    return {
        "command": command,
        "commit": commit or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "native_kernels": native_kernels(),
    }
