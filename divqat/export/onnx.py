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
from torch import Tensor, nn

from divqat.errors import require
from divqat.files import write_atomic
from divqat.quantize.convert import convert
from divqat.quantize.deployed import IntegerLayer

# What ONNX Runtime calls its integer kernels, and the float ones that it leaves in place.
INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")
FLOAT_KERNELS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul")


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        path: the file. bytes: its size.
        layers: quantized convolutions and linear layers in the model.
        int8_layers, float_layers: how many convolutions and matrix products ONNX Runtime runs with
            an integer and with a float kernel, counted in its optimized graph: a layer once per
            call, and those of float layers and of ``torch.matmul`` as well.
        kernels: how often each operation occurs in that graph.
        runtime: ONNX Runtime's version.
    """

    path: Path
    bytes: int
    layers: int
    int8_layers: int
    float_layers: int
    kernels: dict[str, int]
    runtime: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"path": self.path.name}

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes / 1024:.0f} KiB, {self.int8_layers} of "
            f"{self.int8_layers + self.float_layers} convolutions and matrix products run in int8"
        )


def export_onnx(model: nn.Module, example_input: Tensor, path: str | Path) -> ExportReport:
    """Convert a prepared model and write it as ONNX, opset 20, batch dimension free.

    The input is called ``images``, the output ``logits``, both float32. Weights are stored as
    int8, biases as :func:`divqat.convert` makes them. The file appears only when ONNX Runtime has
    loaded it.

    Args:
        model: made by :func:`divqat.prepare`, after training.
        example_input: float32 [N, C, H, W], any N.
        path: the file to write; replaced if it exists.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: as :func:`divqat.convert`. RuntimeError: the exporter or the runtime failed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, "export")
    converted = convert(model)
    example = torch.cat([example_input[:1]] * 2)  # two, as a batch of one would be specialized
    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            converted,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            opset_version=20,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _separate_zero_points(proto.graph)
    kernels: dict[str, int] = {}

    def write(temporary: Path) -> None:
        temporary.write_bytes(proto.SerializeToString())
        kernels.update(runtime_kernels(temporary))

    path = write_atomic(path, write)
    import onnxruntime

    return ExportReport(
        path=path,
        bytes=path.stat().st_size,
        layers=sum(isinstance(module, IntegerLayer) for module in converted.modules()),
        int8_layers=sum(kernels.get(name, 0) for name in INTEGER_KERNELS),
        float_layers=sum(kernels.get(name, 0) for name in FLOAT_KERNELS),
        kernels=kernels,
        runtime=onnxruntime.__version__,
    )


def _separate_zero_points(graph: Any) -> None:
    """Give every weight a zero point of its own; the exporter merges equal ones.

    For ``session.x64quantprecision``: ONNX Runtime 1.32 shifts weights and their zero points to
    uint8 one layer at a time, and fails at one that it has shifted before.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    taken = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
            continue
        shared = node.input[2]
        if shared in taken:
            own = graph.initializer.add()
            own.CopyFrom(constants[shared])
            own.name = node.input[2] = f"{node.output[0]}_zero_point"
        taken.add(shared)


def runtime_kernels(path: str | Path) -> dict[str, int]:
    """How often each operation occurs in ONNX Runtime's optimized CPU graph of a model.

    Raises:
        RuntimeError: ONNX Runtime cannot load the file.
    """
    import tempfile

    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3  # it warns that the optimized file is machine-specific
        try:
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime cannot load {path}: {error}") from error
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    kernels: dict[str, int] = {}
    for node in graph.node:
        kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
    return dict(sorted(kernels.items()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two remarks of the exporter about itself; other warnings pass."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that torchvision's operators are not there
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
