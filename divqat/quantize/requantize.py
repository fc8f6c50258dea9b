"""Quantize again after operations that move values, as runtimes look for quantizers next to layers.

ONNX Runtime runs a convolution in int8 if a DequantizeLinear feeds it. It moves that node through
reshapes and max pooling, but not through splits, slices or padding. The values are on the grid
already: quantizing them again, with the same scale, changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from divqat.quantize import patterns
from divqat.quantize.deployed import IntegerLayer, QuantizeDequantize

# Moves through which ONNX Runtime finds the quantizer.
FOUND_THROUGH: set[Any] = {
    *(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.Flatten, torch.flatten, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"),
}


def requantize(
    graph_module: fx.GraphModule, through: Collection[Any] = frozenset(FOUND_THROUGH)
) -> None:
    """Insert the quantizer again before each layer of a converted model that would not find it.

    Args:
        graph_module: changed in place.
        through: the moves through which the runtime finds it, by default ONNX Runtime.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        layer = graph_module.get_submodule(str(node.target))
        if not isinstance(layer, IntegerLayer):
            continue
        source = value = node.all_input_nodes[0]
        hidden = _pad_before(graph_module, node, layer)
        while (origin := patterns.moved_from(graph_module, source)) is not None:
            hidden |= patterns.operation(graph_module, source) not in through
            source = origin
        quantizer = source.op == "call_module" and graph_module.get_submodule(str(source.target))
        if hidden and isinstance(quantizer, QuantizeDequantize):
            value = node.all_input_nodes[0]
            with graph.inserting_before(node):
                node.replace_input_with(value, graph.call_module(str(source.target), (value,)))
    graph_module.recompile()


def _pad_before(graph_module: fx.GraphModule, node: fx.Node, layer: IntegerLayer) -> bool:
    """Make the padding of a convolution an operation before it, unless it pads with 0."""
    conv: Any = layer.layer
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode == "zeros":
        return False
    graph, value = graph_module.graph, node.all_input_nodes[0]
    with graph.inserting_before(node):
        arguments = (value, conv._reversed_padding_repeated_twice, conv.padding_mode)
        padded = graph.call_function(F.pad, arguments)
    node.replace_input_with(value, padded)
    conv.padding_mode, conv.padding = "zeros", (0, 0)
    return True
