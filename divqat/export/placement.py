"""Which kernel ONNX Runtime runs for each layer of a file, and why one runs in float."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divqat.export.graph import module_name
from divqat.export.runtime import FLOAT_KERNELS, INTEGER_KERNELS, optimized_graph

# What multiplies, in a file as PyTorch exports it.
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
INTEGER = (
    *INTEGER_KERNELS,
    *("MatMulInteger", "DynamicQuantizeMatMul", "QAttention", "QLinearConvTranspose"),
)
FLOAT = (
    *FLOAT_KERNELS,
    *("NhwcFusedConv", "FusedMatMul", "TransposeMatMul", "Einsum"),
    *("Attention", "MultiHeadAttention", "LSTM", "GRU", "RNN"),
)
# Operations between a value and its grid that runtimes fuse, or that only move values.
_FUSED = ("Relu", "Clip", "Add")
_MOVES = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Cast")
# What ONNX Runtime appends to the name of a node that it replaces.
_SUFFIX = re.compile(r"(_token_\d+|_quant|_nhwc|_nchwc|/MatMulAddFusion\S*|/\w+Fusion\S*)+$")


@dataclass(frozen=True)
class Placement:
    """A product of a file, and the kernel that computes it.

    Attributes:
        module: name of the module that multiplies.
        operation: its operation in the file.
        kernel: the operation in ONNX Runtime's optimized graph; "" if no node has its name.
        weighted: whether one factor is a weight; else both are activations.
        reason: why the kernel computes in float; "" for an integer kernel.
    """

    module: str
    operation: str
    kernel: str
    weighted: bool
    reason: str

    @property
    def int8(self) -> bool:
        """Whether the kernel computes with integers."""
        return self.kernel in INTEGER


def placements(path: str | Path) -> list[Placement]:
    """The products of an ONNX file in their order, each with the kernel of a default session.

    Raises:
        RuntimeError: ONNX Runtime cannot load the file.
    """
    import onnx

    file = _Graph(onnx.load(path, load_external_data=False).graph)
    kernels = _kernels(optimized_graph(path))
    result = []
    for node in file.nodes:
        if node.op_type in PRODUCTS:
            kernel = next((kernels[key] for key in _keys(node, file) if key in kernels), "")
            result.append(
                Placement(
                    module=module_name(node),
                    operation=node.op_type,
                    kernel=kernel,
                    weighted=file.weight(node) is not None,
                    reason="" if kernel in INTEGER else file.reason(node),
                )
            )
    return result


def _kernels(graph: Any) -> dict[str, str]:
    """Name, outputs and weights of every product that runs → its operation."""
    result: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in INTEGER or node.op_type in FLOAT:
            result.setdefault(f"node {_SUFFIX.sub('', node.name)}", node.op_type)
            for name in node.input:
                result.setdefault(f"input {name}", node.op_type)
            for name in node.output:
                result.setdefault(f"output {name}", node.op_type)
    return result


def _keys(node: Any, file: _Graph) -> Iterator[str]:
    """How to find the kernel of a node, best first."""
    yield f"node {node.name}"
    yield from (f"output {name}" for name in node.output)
    weight = file.weight(node)
    if weight is not None:
        yield f"input {weight}"


class _Graph:
    """The nodes of a file by what they read and write."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.constants = {constant.name for constant in graph.initializer}
        self.outputs = {output.name for output in graph.output}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def _origin(self, name: str, through: tuple[str, ...]) -> str:
        """The value from which ``name`` is made by operations ``through``."""
        while name in self.makers and self.makers[name].op_type in through:
            name = self.makers[name].input[0]
        return name

    def weight(self, node: Any) -> str | None:
        """The constant that a product reads; None: it reads none."""
        grids = ("DequantizeLinear", "QuantizeLinear", *_MOVES)
        factors = node.input if node.op_type == "Einsum" else node.input[:2]
        for name in reversed(factors):
            origin = self._origin(name, grids)
            if origin in self.constants or self.makers.get(origin, _NONE).op_type == "Constant":
                return origin
        return None

    def _on_a_grid(self, name: str) -> bool:
        origin = self._origin(name, _MOVES)
        return origin in self.makers and self.makers[origin].op_type == "DequantizeLinear"

    def _becomes_codes(self, name: str) -> bool:
        """Whether everything that reads a value quantizes it, after operations that are fused."""
        readers = self.readers.get(name, [])
        if not readers or name in self.outputs:
            return False
        return all(
            reader.op_type == "QuantizeLinear"
            or (reader.op_type in (*_FUSED, *_MOVES) and self._becomes_codes(reader.output[0]))
            for reader in readers
        )

    def reason(self, node: Any) -> str:
        """Why a product computes in float."""
        missing = [
            what
            for what, name in zip(("input", "weight"), node.input, strict=False)
            if not self._on_a_grid(name)
        ]
        if node.op_type.startswith("Conv") and not self._becomes_codes(node.output[0]):
            missing.append("output")
        if missing:
            return f"{' and '.join(missing)} in float"
        return f"no integer kernel of {node.op_type}"


class _Nothing:
    op_type = ""


_NONE = _Nothing()
