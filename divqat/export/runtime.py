"""What ONNX Runtime makes of a file on a CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

# What ONNX Runtime calls its integer kernels, and the float ones that it leaves in place.
INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")
FLOAT_KERNELS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul")


def optimized_graph(path: str | Path) -> Any:
    """The ``onnx.GraphProto`` that ONNX Runtime runs by default, whatever the CPU.

    Raises:
        RuntimeError: ONNX Runtime cannot load the file.
    """
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
        return onnx.load(options.optimized_model_filepath, load_external_data=False).graph


def runtime_kernels(path: str | Path) -> dict[str, int]:
    """How often each operation occurs in ONNX Runtime's optimized CPU graph of a model.

    Raises:
        RuntimeError: ONNX Runtime cannot load the file.
    """
    kernels: dict[str, int] = {}
    for node in optimized_graph(path).node:
        kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
    return dict(sorted(kernels.items()))
