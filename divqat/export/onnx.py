"""Export to ONNX with QuantizeLinear / DequantizeLinear nodes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from divqat._util.errors import require
from divqat._util.files import write_atomic
from divqat.export.arguments import arguments, output_names
from divqat.export.graph import (
    check_divisors,
    drop_stack_traces,
    fix_average_pools,
    separate_constants,
)
from divqat.export.metadata import check_metadata, declare_input
from divqat.export.runtime import FLOAT_KERNELS, INTEGER_KERNELS, runtime_kernels
from divqat.export.saturation import Saturating, advice, saturating
from divqat.quantize.convert import convert
from divqat.quantize.deployed import IntegerLayer
from divqat.victim.metadata import InputMetadata


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        path: the file.
        bytes: its size.
        layers: number of quantized convolutions and linear layers in the model.
        int8_layers, float_layers: number of convolutions and matrix products that ONNX Runtime runs
            with integer and with float kernels, counted in its optimized graph: once per call of a
            layer, and including those of float layers and of ``torch.matmul``.
        kernels: number of occurrences of each operation in that graph.
        runtime: version of ONNX Runtime.
        saturating: layers whose sums may saturate on x86 CPUs without VNNI, see
            :mod:`divqat.export.saturation`; empty with the default width of weights.
    """

    path: Path
    bytes: int
    layers: int
    int8_layers: int
    float_layers: int
    kernels: dict[str, int]
    runtime: str
    saturating: tuple[Saturating, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"path": self.path.name}

    def __str__(self) -> str:
        text = (
            f"{self.path}: {self.bytes / 1024:.0f} KiB, {self.int8_layers} of "
            f"{self.int8_layers + self.float_layers} convolutions and matrix products run in int8"
        )
        return f"{text}\n{advice(self.saturating)}" if self.saturating else text


def export_onnx(
    model: nn.Module,
    example_input: Any,
    path: str | Path,
    *,
    metadata: InputMetadata | None = None,
) -> ExportReport:
    """Convert a prepared model and write it as ONNX, opset 20, with a dynamic batch dimension.

    The input is called ``images``, the output ``logits``, both float32, or the input uint8 if
    ``metadata`` says so. Several inputs have the
    names of the forward's arguments, several outputs those of their keys or ``output_0``. Weights
    are stored as int8, biases as in :func:`divqat.convert`. The file is only written if ONNX
    Runtime can load it.
    A warning names the layers whose sums may saturate on an x86 CPU without VNNI, which can happen
    with weights of more than 7 bits.

    Args:
        model: a trained model, made by :func:`divqat.prepare`.
        example_input: float32 [N, C, H, W] or [N, D], any N, or the arguments as for
            :func:`divqat.prepare`; tensors of N rows have a dynamic first dimension.
        path: the file to write; replaced if it exists.
        metadata: what the file declares of its input, see :func:`divqat.export.read_metadata`. With
            its ``dtype`` uint8 the file takes pictures [N, C, H, W] and normalizes them itself; the
            model and ``example_input`` are the same.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        TypeError: ``example_input`` is not float32 (the model may have any dtype).
        ValueError: see :func:`divqat.convert`; ``metadata`` does not fit the model's input and
            output; or an average pooling that ONNX does not support or
            that ONNX Runtime computes differently.
        RuntimeError: the exporter or the runtime failed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, "export")
    inputs = arguments(model, example_input)
    if metadata is not None:
        check_metadata(metadata, inputs.values)
    converted = convert(model)
    outputs = output_names(converted)
    with _quiet():
        try:
            program = torch.onnx.export(
                converted,
                inputs.values,
                dynamo=True,
                input_names=inputs.names,
                output_names=outputs,
                dynamic_shapes=inputs.dynamic_shapes,
                opset_version=20,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise RuntimeError(f"model: torch.onnx.export failed: {_cause(error)}") from error
    assert program is not None and program.exported_program is not None
    check_divisors(program.exported_program.graph)
    proto = program.model_proto
    separate_constants(proto.graph)
    fix_average_pools(proto.graph)
    drop_stack_traces(proto.graph)
    if metadata is not None:
        declare_input(proto, metadata)
    kernels: dict[str, int] = {}
    layers: list[Saturating] = []

    def write(temporary: Path) -> None:
        temporary.write_bytes(proto.SerializeToString())
        kernels.update(runtime_kernels(temporary))
        layers.extend(saturating(temporary))

    path = write_atomic(path, write)
    if layers:
        warnings.warn(f"{path}: {advice(layers)}", stacklevel=2)
    import onnxruntime

    return ExportReport(
        path=path,
        bytes=path.stat().st_size,
        layers=sum(isinstance(module, IntegerLayer) for module in converted.modules()),
        int8_layers=sum(kernels.get(name, 0) for name in INTEGER_KERNELS),
        float_layers=sum(kernels.get(name, 0) for name in FLOAT_KERNELS),
        kernels=kernels,
        runtime=onnxruntime.__version__,
        saturating=tuple(layers),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two messages of the exporter about itself; other warnings pass."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first cause of an error; the exporter wraps it in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]
