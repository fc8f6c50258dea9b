"""The GPUs that a build has code for, and those of this machine."""

from __future__ import annotations

import ctypes
import functools
import re


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for ``architectures`` runs on a GPU of this compute capability.

    Args:
        architectures: as in ``TORCH_CUDA_ARCH_LIST``. Machine code ("8.0") runs on the minor
            versions from its own on, PTX ("9.0+PTX") on all later ones, code for one chip ("9.0a")
            on that alone. A name ("Hopper") is taken to run: torch alone knows what it stands for.
        capability: (major, minor).
    """
    for entry in re.split(r"[;\s]+", architectures):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            return True
        own = int(found[1]), int(found[2])
        same = capability[0] == own[0] and capability >= own
        if capability == own or (not found[3] and (same or (found[4] and capability >= own))):
            return True
    return False


@functools.cache
def capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capabilities of this machine's GPUs, also of those hidden from CUDA; empty where
    the driver does not say.

    They are asked of NVML: CUDA would be initialized, and a fork of this process could not use it.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    found = []
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        gpu, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        numbers = ctypes.byref(major), ctypes.byref(minor)
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(gpu)) != 0:
            continue
        if nvml.nvmlDeviceGetCudaComputeCapability(gpu, *numbers) == 0:
            found.append((major.value, minor.value))
    nvml.nvmlShutdown()
    return tuple(found)
