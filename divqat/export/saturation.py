"""Saturation of the 16-bit sums of integer kernels, and its effect on the answers of a file.

An x86 CPU without VNNI multiplies uint8 activations by int8 weights with ``vpmaddubsw``, which adds
two neighboring products in 16 bits and saturates at −32768 and 32767. Weights of up to ±64 cannot
saturate: 2 · 255 · 64 = 32640. In ONNX Runtime's kernels (MLAS) the neighbors of a linear layer are
the inputs 2k and 2k + 1. Those of a convolution, which reads images in channels-last order, are
the channels 2k and 2k + 1 of a pixel (if the number of channels is odd, also the last channel of a
pixel and the first of the next one). A depthwise convolution has no 16-bit sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from divqat._util.errors import require
from divqat.export.graph import module_name
from divqat.export.runtime import optimized_graph

LOWEST, HIGHEST, TOP = -(2**15), 2**15 - 1, 255  # ends of int16; largest uint8
# Integer kernel → indices of the inputs: scale and zero point of x, weight, scale of the weight.
INPUTS = {
    "QLinearConv": (1, 2, 3, 4),
    "QGemm": (1, 2, 3, 4),
    "QLinearMatMul": (1, 2, 3, 4),
    "MatMulIntegerToFloat": (2, 4, 1, 3),
}


@dataclass(frozen=True)
class Saturating:
    """A layer whose sums can saturate.

    Attributes:
        layer: the module's name.
        pairs: number of pairs of neighboring weights that can saturate.
        of: number of all pairs.
        largest: the largest possible sum of two products, in absolute value.
    """

    layer: str
    pairs: int
    of: int
    largest: int


@dataclass(frozen=True)
class _Kernel:
    """An integer kernel, its weights in the order of the products, and its critical pairs."""

    node: str  # name in the file
    weight: np.ndarray  # int64 [C_out, K], padded with a 0 to an even K
    size: int  # K without padding
    spatial: tuple[int, ...]  # spatial size of the filter; () for a matrix product
    x_scale: float
    x_zero_point: int  # for codes from 0 to 255
    scale: np.ndarray  # scale of the weight, float32 [C_out]
    critical: np.ndarray  # pairs that can saturate, bool [C_out, K / 2]
    largest: int


def saturating(path: str | Path) -> list[Saturating]:
    """The layers of an ONNX file whose sums can saturate on an x86 CPU without VNNI.

    Raises:
        RuntimeError: ONNX Runtime cannot load the file.
        ValueError: the names of its nodes are missing or not unique.
        ImportError: onnx is missing.
    """
    onnx = require("onnx", "export")
    kernels = list(_critical_kernels(path))
    graph = onnx.load(path, load_external_data=False).graph
    return [
        Saturating(
            layer=module_name(_node(graph, kernel)),
            pairs=int(kernel.critical.sum()),
            of=kernel.critical.size,
            largest=kernel.largest,
        )
        for kernel in kernels
    ]


def advice(layers: Sequence[Saturating]) -> str:
    """A sentence on the layers that can saturate and the remedies."""
    worst = sorted(layers, key=lambda layer: -layer.pairs / layer.of)
    named = ", ".join(f"{layer.layer} ({layer.pairs} of {layer.of} pairs)" for layer in worst[:3])
    more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
    return (
        f"sums of int8 products can saturate on x86 CPUs without VNNI, in {named}{more}: "
        "train with weight_bits=7, or set session.x64quantprecision in ONNX Runtime"
    )


def emulated_session(path: str | Path) -> Any:
    """An ``onnxruntime.InferenceSession`` that emulates, on any CPU, one without VNNI.

    Layers are computed in float, and the error of the saturating pairs of products is added to
    their output. Except for rounding, the answers are those of a default session on such a CPU.

    Raises:
        RuntimeError: ONNX Runtime cannot load the file.
        ValueError: the names of its nodes are missing or not unique.
        ImportError: onnx is missing.
    """
    onnx, onnxruntime = require("onnx", "export"), require("onnxruntime", "export")
    model = onnx.load(path)
    for kernel in _critical_kernels(path):
        _saturate(model.graph, _node(model.graph, kernel), kernel)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _node(graph: Any, kernel: _Kernel) -> Any:
    """The node from which ONNX Runtime made ``kernel``; it keeps existing, unique names.

    Raises:
        ValueError: there is not exactly one node of that name.
    """
    nodes = [node for node in graph.node if node.name == kernel.node]
    if len(nodes) != 1:
        raise ValueError(
            f"onnx_path: wanted a file written by export_onnx, got {len(nodes)} nodes "
            f"of the name {kernel.node!r}"
        )
    return nodes[0]


def _critical_kernels(path: str | Path) -> Iterator[_Kernel]:
    from onnx import helper, numpy_helper

    graph = optimized_graph(path)
    constants = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type not in INPUTS:
            continue
        names = [node.input[index] for index in INPUTS[node.op_type]]
        if any(name not in constants for name in names):
            continue  # products of two uint8 activations are added in 32 bits
        x_scale, x_zero_point, weight, scale = (
            numpy_helper.to_array(constants[name]) for name in names
        )
        if weight.dtype != np.int8:
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        rows, spatial = weight, weight.shape[2:]
        if node.op_type == "QLinearConv":
            if attributes.get("group", 1) == len(weight) and weight.shape[1] == 1:
                continue
            rows = np.moveaxis(weight, 1, -1)
        elif not attributes.get("transB"):
            rows = weight.T
        rows = rows.reshape(len(rows), -1).astype(np.int64)
        size = rows.shape[1]
        rows = np.pad(rows, ((0, 0), (0, size % 2)))
        a, b = rows[:, ::2], rows[:, 1::2]
        high = TOP * (a.clip(min=0) + b.clip(min=0))
        low = TOP * (a.clip(max=0) + b.clip(max=0))
        critical = (high > HIGHEST) | (low < LOWEST)
        if critical.any():
            yield _Kernel(
                node=re.sub(r"_token_\d+$", "", node.name),  # suffix of a channels-last copy
                weight=rows,
                size=size,
                spatial=spatial,
                x_scale=float(x_scale),
                x_zero_point=int(x_zero_point) + 128 * (x_zero_point.dtype == np.int8),
                scale=np.broadcast_to(scale, len(rows)),
                critical=critical,
                largest=int(max(high.max(), -low.min())),
            )


def _saturate(graph: Any, node: Any, kernel: _Kernel) -> None:
    """Add min(max(s, −32768), 32767) − s to the output of ``node``, for the sum s of every critical
    pair of products."""
    from onnx import helper, numpy_helper

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(
            numpy_helper.from_array(np.asarray(value, np.float32), f"{node.name}/{name}")
        )
        return f"{node.name}/{name}"

    def add(op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{node.name}/{len(added)}"
        added.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    added: list[Any] = []
    channels, pairs = np.nonzero(kernel.critical)  # [P] each
    products = np.arange(len(pairs))
    weights = np.zeros((len(pairs), kernel.weight.shape[1]))  # of each pair alone, [P, K]
    for column in (2 * pairs, 2 * pairs + 1):
        weights[products, column] = kernel.weight[channels, column]
    offset = constant("offset", kernel.x_zero_point * weights.sum(1))
    back = np.zeros((len(kernel.weight), len(pairs)))  # [C_out, P]
    back[channels, products] = kernel.x_scale * kernel.scale[channels]
    output = node.output[0]
    node.output[0] = f"{node.name}/exact"
    # Codes minus their zero point, so that padding is 0.
    codes = add("Round", add("Div", node.input[0], constant("scale", kernel.x_scale)))
    if kernel.spatial:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        filters = _filters(weights[:, : kernel.size], channels, kernel, attributes.pop("group", 1))
        sums = add("Conv", codes, constant("pairs", filters), offset, **attributes)
    else:
        sums = add("MatMul", codes, constant("pairs", weights[:, : kernel.size].T))
        sums = add("Add", sums, offset)
    limits = constant("lowest", LOWEST), constant("highest", HIGHEST)
    lost = add("Sub", add("Clip", sums, *limits), sums)
    if kernel.spatial:
        ones = [1] * len(kernel.spatial)
        lost = add("Conv", lost, constant("back", back.reshape(*back.shape, *ones)))
    else:
        lost = add("MatMul", lost, constant("back", back.T))
    add("Add", node.output[0], lost, output=output)
    after = [*graph.node].index(node) + 1
    for new in reversed(added):
        graph.node.insert(after, new)


def _filters(
    weights: np.ndarray,  # [P, K]
    channels: np.ndarray,  # [P]
    kernel: _Kernel,
    groups: int,
) -> np.ndarray:  # [P, C_in, *spatial]
    """Rows of weights as filters over all input channels; those of other groups are 0."""
    filters = np.moveaxis(weights.reshape(len(weights), *kernel.spatial, -1), -1, 1)
    width = filters.shape[1]
    whole = np.zeros((len(weights), groups * width, *kernel.spatial))
    group = channels // (len(kernel.weight) // groups)
    inputs = group[:, None] * width + np.arange(width)  # [P, C_in / groups]
    whole[np.arange(len(weights))[:, None], inputs] = filters
    return whole
