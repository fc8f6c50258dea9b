"""Export to ExecuTorch, whose XNNPACK kernels run int8 networks on phones and CPUs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from divqat._util.errors import require
from divqat._util.files import write_atomic
from divqat.export.program import export_program

DELEGATE = "executorch_call_delegate"


@dataclass(frozen=True)
class ExecuTorchReport:
    """The result of an export.

    Attributes:
        path: the file.
        bytes: its size.
        delegates: number of parts that XNNPACK runs.
        others: operations that it leaves to ExecuTorch's own kernels, in float, with their number;
            conversions between codes and floats count as such.
    """

    path: Path
    bytes: int
    delegates: int
    others: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"path": self.path.name}

    def __str__(self) -> str:
        rest = ", ".join(f"{count} {name}" for name, count in self.others.items())
        return (
            f"{self.path}: {self.bytes / 1024:.0f} KiB, {self.delegates} parts run in XNNPACK; "
            f"others: {rest or 'none'}"
        )


def export_executorch(model: nn.Module, example_input: Any, path: str | Path) -> ExecuTorchReport:
    """Write a prepared model as an ExecuTorch program (``.pte``) for XNNPACK.

    It takes one row at a time and gives the outputs rounded to 8 bits, see
    :func:`divqat.export.export_program`.

    Args:
        model: a trained model, made by :func:`divqat.prepare`.
        example_input: float32 [N, C, H, W], pictures of the model's kind, some hundreds, whose
            outputs' range becomes the outputs' grid; or the arguments as for ``prepare``.
        path: the file to write; replaced if it exists.

    Raises:
        ImportError: executorch or torchao is missing.
        TypeError, ValueError: see :func:`divqat.export.export_program`.
        RuntimeError: ExecuTorch cannot lower the model.
    """
    with _quiet():
        exir = require("executorch.exir", "executorch")
        xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    program = export_program(model, example_input)
    try:
        with _quiet():
            lowered = exir.to_edge_transform_and_lower(
                program, partitioner=[xnnpack.XnnpackPartitioner()]
            )
            graph = lowered.exported_program().graph
            data = lowered.to_executorch().buffer
    except Exception as error:
        raise RuntimeError(f"model: ExecuTorch cannot lower it: {error}") from error
    calls = Counter(_name(node.target) for node in graph.nodes if node.op == "call_function")
    path = write_atomic(path, lambda temporary: temporary.write_bytes(data))
    delegates = calls.pop(DELEGATE, 0)
    calls.pop("getitem", None)
    return ExecuTorchReport(path, path.stat().st_size, delegates, dict(sorted(calls.items())))


def _name(target: Any) -> str:
    text = str(target) if not hasattr(target, "__name__") else target.__name__
    return text.removesuffix(".default").rpartition(".")[2] or text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the libraries say about themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
