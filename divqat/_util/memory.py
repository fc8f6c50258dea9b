"""Peak memory and free memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the peak; unsupported on a CPU without Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.is_file():
        with suppress(OSError):  # without it, the peak is that of the whole process
            CLEAR.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes since :func:`reset_peak`: of tensors on a GPU, of the whole process on
    the CPU; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(STATUS, "VmHWM")


def free_memory(device: torch.device) -> int | None:
    """Free memory in bytes; None if it is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    swap = _kilobytes(Path("/proc/meminfo"), "SwapFree")
    if available is None:
        return None
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # not in a container, or one without a limit
        return available + (swap or 0)
    # The system frees inactive page cache when memory is short.
    cached = _number(CGROUP / "memory.stat", "inactive_file") or 0
    return min(available + (swap or 0), limit - used + cached)


def _kilobytes(file: Path, name: str) -> int | None:
    """The value of ``name`` in a file of lines ``name: 123 kB``, in bytes."""
    value = _number(file, f"{name}:")
    return None if value is None else 1024 * value


def _number(file: Path, name: str) -> int | None:
    """The number after ``name`` at the beginning of a line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return None
