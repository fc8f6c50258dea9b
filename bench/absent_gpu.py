"""A Triton driver for a GPU that does not exist: it compiles kernels and records launches.

The launchers in kernels/ run unchanged, on CPU tensors that are neither read nor written. The host
time of a launch is real, except for the driver's own call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class AbsentGPU:
    """A GPU of compute capability ``arch`` (80, 90), with the memory of a large multiprocessor.

    Attributes:
        launches: names of the kernels launched since the last ``absent_gpu``.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[str] = []
        self.utils = self  # Triton calls the methods of the driver's utils

    def launcher_cls(self, src, metadata):
        name = metadata.name
        return lambda *args: self.launches.append(name)

    def load_binary(self, name, kernel, shared, device):
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, maximum number of threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 166912, "multiprocessor_count": 108, "warpSize": 32}

    def get_current_device(self):
        return self.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


# Cached, as a compiled kernel keeps the launcher of the driver of its first launch.
_gpu = functools.cache(AbsentGPU)


@contextmanager
def absent_gpu(arch: int) -> Iterator[AbsentGPU]:
    """A block in which Triton launches kernels on an absent GPU."""
    gpu = _gpu(arch)
    gpu.launches.clear()
    before = driver._active
    driver.set_active(gpu)
    try:
        yield gpu
    finally:
        driver._active = before
