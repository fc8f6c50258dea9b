"""Cases of a benchmark, and the contenders of each case."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from divqat import ops
from divqat.ops._backend import PREFERRED, missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPY = "copy"  # a contender that only moves the bytes
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Absent(Exception):
    """A contender is not available here; the message says why."""


def import_peer(module: str, package: str) -> Any:
    """Import a module that only the comparison needs.

    Raises:
        Absent: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{package} is not installed ({error})") from error


@dataclass(frozen=True)
class Plan:
    """The name of a case, before its memory is allocated.

    Attributes:
        op: the op of ``divqat.ops`` and its variant.
        on: its input: a layer of a network, or a shape.
        shape: of the input; empty if there are several inputs.
        dtype, layout: keys of :data:`DTYPES` and :data:`LAYOUTS`.
    """

    op: str
    on: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify a case among rows."""
        return self.op, self.on, self.dtype, self.layout

    def __str__(self) -> str:
        return ", ".join(self.key)


def serving(backend: str | None) -> AbstractContextManager[None]:
    """A block with this divqat backend; None: with the current one."""
    return nullcontext() if backend is None else ops.backend(backend)


@dataclass
class Contender:
    """One implementation of a case, called as its users call it.

    Attributes:
        forward: a differentiable function from the case's arguments to the output.
        parameters: further tensors whose gradients are computed.
        backend: the divqat backend, for our own contenders.
        facts: after a call, values for the check of the case (scale, zero point ...).
        saves: bytes of the case's minimum that this contender does not have to move.
    """

    forward: Callable[..., Any]
    parameters: Sequence[Tensor] = ()
    backend: str | None = None
    facts: Callable[[], dict[str, Any]] = dict
    saves: float = 0.0

    def serving(self) -> AbstractContextManager[None]:
        """A block in which this contender runs."""
        return serving(self.backend)


@dataclass
class Inputs:
    """Arguments of one call; several sets take turns, so that caches are cold."""

    args: tuple[Any, ...]
    leaves: list[Tensor]  # the arguments whose gradients are computed
    grads: list[Tensor] | None  # of the outputs; None for a scalar output


@dataclass
class Case:
    """A row of the report: contenders that must agree with an independent reference.

    Attributes:
        plan: its name.
        inputs: several sets that take turns; together they exceed the last-level cache.
        bytes: minimum number of bytes that the computation has to read and write.
        copied: the tensors that the reference copy copies, per entry of ``inputs``.
        contenders: name → function that creates it, or raises :class:`Absent`.
        check: raises AssertionError if outputs or gradients are wrong.
        inputs_live_on: the inputs are parameters: saving them for the backward costs nothing.
    """

    plan: Plan
    inputs: list[Inputs]
    bytes: float
    copied: list[list[Tensor]]
    contenders: dict[str, Callable[[], Contender]]
    check: Callable[[Contender, Inputs, list[Tensor], list[Tensor]], None]
    inputs_live_on: bool = False

    def run(self, contender: Contender, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Run forward and backward on the ``i``-th inputs, modulo their number."""
        inputs = self.inputs[i % len(self.inputs)]
        out = contender.forward(*inputs.args)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        leaves = [*inputs.leaves, *contender.parameters]
        return outputs, list(torch.autograd.grad(outputs, leaves, inputs.grads))


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache of the device; 32 MB if unknown."""
    if device == "cuda":
        return torch.cuda.get_device_properties("cuda").L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def rotations(nbytes: float, device: str) -> int:
    """The number of inputs of ``nbytes`` that fill the cache twice, at least two."""
    return max(2, int(2 * last_level_cache(device) // max(1, nbytes)) + 1)


def our_backends(device: str) -> dict[str, Callable[[], str]]:
    """``divqat <backend>`` → function that returns its name, or raises :class:`Absent`."""

    def present(backend: str) -> str:
        if reason := missing(backend, device):
            raise Absent(reason)
        return backend

    return {f"divqat {name}": lambda name=name: present(name) for name in PREFERRED[device]}
