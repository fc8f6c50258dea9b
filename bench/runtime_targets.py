"""The runtimes of ``python -m bench runtimes``: how a trained and a float network become files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.deployed import float_onnx
from divqat.export import export_executorch, export_onnx, export_openvino


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        package: its name on PyPI, and of its module.
        suffix: of its files.
        export: (prepared network, images, path) → writes the file; returns the report.
        export_float: the same for a float network.
    """

    package: str
    suffix: str
    export: Callable[[nn.Module, Tensor, Path], Any]
    export_float: Callable[[nn.Module, Tensor, Path], Any]


def float_executorch(net: nn.Module, images: Tensor, path: Path) -> None:
    """A float network as a program for XNNPACK."""
    exir = importlib.import_module("executorch.exir")
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    program = torch.export.export(net, (images[:1],))
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def float_openvino(net: nn.Module, images: Tensor, path: Path) -> None:
    """A float network as OpenVINO's graph and weights."""
    openvino: Any = importlib.import_module("openvino")
    float_onnx(net, images, path.with_suffix(".onnx"))
    model = openvino.Core().read_model(path.with_suffix(".onnx"))
    openvino.save_model(model, path, compress_to_fp16=False)


TARGETS = {
    "ONNX Runtime": Target("onnxruntime", ".onnx", export_onnx, float_onnx),
    "ExecuTorch": Target("executorch", ".pte", export_executorch, float_executorch),
    "OpenVINO": Target("openvino", ".xml", export_openvino, float_openvino),
}
