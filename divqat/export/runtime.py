"""The optimized graph and the kernels of ONNX Runtime on a CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

# ONNX Runtime's names of integer kernels, and of the float kernels that may remain.
INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")
FLOAT_KERNELS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul")


def optimized_graph(path: str | Path) -> Any:
    """The ``onnx.GraphProto`` that ONNX Runtime runs by default, the same on every CPU.

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
    """The number of occurrences of each operation in ONNX Runtime's optimized graph of a model.

    Raises:
        RuntimeError: ONNX Runtime cannot load the file.
    """
    kernels: dict[str, int] = {}
    for node in optimized_graph(path).node:
        kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
    return dict(sorted(kernels.items()))
