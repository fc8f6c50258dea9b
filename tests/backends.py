"""Which kernels can serve the ops here, for the suites that run over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda_emulator.build import build, why_not

from divqat import ops
from divqat.ops import _native, _triton

EMULATED = "cuda-emulated"
INTERPRETED = "triton-interpreted"


def names(every_set: bool = True) -> list:
    """The PyTorch references, as ops and ``traceable``, the native kernels for each instruction set
    of this machine (or the best one alone, where only the op's registration matters), the CUDA
    kernels run by the emulator, and on a CUDA device the CUDA and the Triton kernels themselves
    (marked ``gpu``). Under ``TRITON_INTERPRET=1``, which holds for a whole process, nothing but the
    Triton kernels on CPU tensors.
    """
    if _triton.interpreted():
        return [INTERPRETED]
    native = [] if _native.extension is None else _native.extension.instruction_sets()
    native = native if every_set else native[:1]
    emulated = [EMULATED] if why_not() is None else []
    device = []
    if torch.cuda.is_available():
        absent = {"cuda": _native.missing("cuda"), "triton": _triton.missing("cuda")}
        device = [pytest.param(n, marks=pytest.mark.gpu) for n in absent if not absent[n]]
    return ["torch", "traceable", *native, *emulated, *device]


@contextmanager
def serving(name: str) -> Iterator[None]:
    """Let the named kernels serve the ops; those of a device put new tensors there."""
    if name == INTERPRETED:
        with ops.backend("triton"):
            yield
        return
    if name in ("torch", "traceable"):
        with ops.backend(name):
            yield
        return
    if name == EMULATED:
        with ops.backend("torch"):
            registration = build().Registration("cpu")
            try:
                yield
            finally:
                registration.remove()
        return
    if name in ("cuda", "triton"):
        with ops.backend(name), torch.device("cuda"):
            yield
        return
    extension = _native.extension
    before = extension.instruction_set()
    extension.use_instruction_set(name)
    try:
        with ops.backend("native"):
            yield
    finally:
        extension.use_instruction_set(before)


def launches(emulator, function) -> tuple:
    """What the function returns and how many kernels it launched."""
    before = emulator.launch_count()
    result = function()
    return result, emulator.launch_count() - before
