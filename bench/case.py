"""What a benchmark consists of: cases, and the contenders that compete in each."""

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
    """A contender that cannot take part here, and why."""


def need(module: str, package: str) -> Any:
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
    """Names a case before its memory is allocated.

    Attributes:
        op: the op of ``divqat.ops`` and its variant.
        on: what it works on: a network's layer, or a shape.
        shape: that of the input; empty where there are many.
        dtype, layout: keys of :data:`DTYPES` and :data:`LAYOUTS`.
    """

    op: str
    on: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a case among rows."""
        return self.op, self.on, self.dtype, self.layout

    def __str__(self) -> str:
        return ", ".join(self.key)


def serving(backend: str | None) -> AbstractContextManager[None]:
    """A block in which the divqat backend serves; None: whichever does."""
    return nullcontext() if backend is None else ops.backend(backend)


@dataclass
class Contender:
    """One way of computing what a case asks for, as its users call it.

    Attributes:
        forward: maps the case's arguments to the output, differentiable.
        parameters: trained by it beside the case's own inputs; gradients are asked for.
        backend: the divqat backend that serves while it runs, if it is one of ours.
        facts: what the check of the case wants to know (scale, zero point ...), after a call.
        saves: bytes of the case's floor that this contender need not move.
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
    """Arguments of one call; several of them take turns, so that caches are cold."""

    args: tuple[Any, ...]
    leaves: list[Tensor]  # those of the arguments that gradients are asked for
    grads: list[Tensor] | None  # of the outputs; None for a scalar output


@dataclass
class Case:
    """A row of the report: contenders that must agree with an independent reference.

    Attributes:
        plan: what it is.
        inputs: several, that take turns; together they exceed the last-level cache.
        bytes: memory that the computation has to move at least: reads and writes.
        copied: the tensors whose copy is the yardstick, per entry of ``inputs``.
        contenders: name → makes it, or raises :class:`Absent`.
        check: raises AssertionError for outputs and gradients that are wrong.
        inputs_live_on: the inputs are parameters: keeping them for the backward costs nothing.
    """

    plan: Plan
    inputs: list[Inputs]
    bytes: float
    copied: list[list[Tensor]]
    contenders: dict[str, Callable[[], Contender]]
    check: Callable[[Contender, Inputs, list[Tensor], list[Tensor]], None]
    inputs_live_on: bool = False

    def run(self, contender: Contender, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Forward and backward on the ``i``-th inputs, in turn."""
        inputs = self.inputs[i % len(self.inputs)]
        out = contender.forward(*inputs.args)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        leaves = [*inputs.leaves, *contender.parameters]
        return outputs, list(torch.autograd.grad(outputs, leaves, inputs.grads))


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache of the device; 32 MB where that is unknown."""
    if device == "cuda":
        return torch.cuda.get_device_properties("cuda").L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def rotations(nbytes: float, device: str) -> int:
    """How many inputs of ``nbytes`` take turns: enough to fill the cache twice, at least two."""
    return max(2, int(2 * last_level_cache(device) // max(1, nbytes)) + 1)


def our_backends(device: str) -> dict[str, Callable[[], str]]:
    """``divqat <backend>`` → the backend's name, or :class:`Absent` with the reason."""

    def present(backend: str) -> str:
        if reason := missing(backend, device):
            raise Absent(reason)
        return backend

    return {f"divqat {name}": lambda name=name: present(name) for name in PREFERRED[device]}
