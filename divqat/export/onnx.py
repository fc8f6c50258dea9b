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
from divqat.export.arguments import Arguments, arguments, output_names
from divqat.export.graph import (
    check_divisors,
    drop_stack_traces,
    fix_average_pools,
    separate_constants,
)
from divqat.export.metadata import check_metadata, declare_input
from divqat.export.opset import DEFAULT, chosen_opset, pack_weights, set_opset
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
        opset: of the file.
        packed: number of weights in INT4.
        saved: bytes that the file is smaller for that.
    """

    path: Path
    bytes: int
    layers: int
    int8_layers: int
    float_layers: int
    kernels: dict[str, int]
    runtime: str
    saturating: tuple[Saturating, ...] = ()
    opset: int = DEFAULT
    packed: int = 0
    saved: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"path": self.path.name}

    def __str__(self) -> str:
        text = (
            f"{self.path}: {self.bytes / 1024:.0f} KiB, {self.int8_layers} of "
            f"{self.int8_layers + self.float_layers} convolutions and matrix products run in int8"
        )
        if self.packed:
            text += f"; {self.packed} weights in INT4 save {self.saved / 1024:.0f} KiB"
        return f"{text}\n{advice(self.saturating)}" if self.saturating else text


def export_onnx(
    model: nn.Module,
    example_input: Any,
    path: str | Path,
    *,
    metadata: InputMetadata | None = None,
    opset: int | None = None,
    pack_int4: bool = False,
) -> ExportReport:
    """Convert a prepared model and write it as ONNX with a dynamic batch dimension.

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
        opset: 13 to 21; None: 20, or 21 with ``pack_int4``.
        pack_int4: store weights of at most 4 bits as INT4 (opset 21), two in a byte. The answers
            are the same; ONNX Runtime 1.32 has no integer kernels for them, and unpacks them to
            floats.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        TypeError: ``example_input`` is not float32 (the model may have any dtype).
        ValueError: see :func:`divqat.convert`; ``opset`` is out of range or cannot express the
            model; ``pack_int4`` finds nothing to pack or another opset; ``metadata`` does not fit
            the model's input and output; or an average pooling that ONNX does not support or that
            ONNX Runtime computes differently.
        RuntimeError: the exporter or the runtime failed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, "export")
    opset = chosen_opset(opset, pack_int4)
    inputs = arguments(model, example_input)
    if metadata is not None:
        check_metadata(metadata, inputs.values)
    converted = convert(model)
    proto = _proto(converted, inputs)
    if metadata is not None:
        declare_input(proto, metadata)
    set_opset(proto, opset)
    unpacked = proto.ByteSize()
    packed = pack_weights(proto.graph) if pack_int4 else 0
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
        opset=opset,
        packed=packed,
        saved=unpacked - proto.ByteSize(),
    )


def _proto(converted: nn.Module, inputs: Arguments) -> Any:
    """The ``onnx.ModelProto`` of PyTorch's exporter, in opset 20, corrected."""
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
                opset_version=DEFAULT,
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
    return proto


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
