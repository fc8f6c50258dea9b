"""Properties of the operations of a traced graph, for prepare."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from divqat.nn import QuantConvBn2d
from divqat.nn._layer import QuantLayer
from divqat.nn.function import QuantFunction

# Operations that only move values: their output is on the same grid as their input.
TRANSPARENT: set[Any] = {
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.Dropout, nn.Dropout2d, nn.PixelShuffle, nn.ChannelShuffle, nn.ZeroPad2d),
    *(F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.pixel_shuffle),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.unflatten, F.channel_shuffle, F.pixel_unshuffle, nn.PixelUnshuffle),
    *("flatten", "unflatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze"),
    *("contiguous", "expand", "movedim", "swapaxes"),
    *(nn.Dropout1d, nn.Dropout3d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
}

# Moves of values that return tuples.
PARTS: set[Any] = {
    *(torch.chunk, torch.split, torch.unbind, torch.tensor_split),
    *("chunk", "split", "unbind", "tensor_split"),
}

# Operations whose inputs are all quantized, besides the quantized layers themselves. ReLU and ReLU6
# are not among them: runtimes fuse those into the preceding layer, with no grid in between.
QUANTIZED: set[Any] = {
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    *(torch.cat, torch.mean, "mean", torch.matmul, operator.matmul),
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Tanh, nn.LeakyReLU),
    *(F.hardswish, F.hardsigmoid, F.sigmoid, F.silu, F.gelu, F.tanh, F.leaky_relu),
    *(torch.sigmoid, torch.tanh, "sigmoid", "tanh", nn.Upsample, F.interpolate),
}

RELUS: set[Any] = {nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}

BATCHNORMS: set[Any] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, QuantConvBn2d}

# Activations that runtimes fuse into the preceding convolution.
FUSED: set[Any] = RELUS | {nn.ReLU6, F.relu6}


def operation(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """The operation of a node: a module's type, a function, or a method's name."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target)))
    return node.target if node.op in ("call_function", "call_method") else None


def is_inplace(graph_module: fx.GraphModule, relu: fx.Node) -> bool:
    """Whether a ReLU overwrites its input."""
    if relu.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(relu.target)), "inplace", False))
    if relu.target in (F.relu_, torch.relu_, "relu_"):
        return True
    return bool(relu.kwargs.get("inplace") or relu.args[1:2] == (True,))


def scopes(node: fx.Node) -> Iterator[str]:
    """The names of the modules in whose forward ``node`` was traced, including its own."""
    return (name for name, _ in node.meta.get("nn_module_stack", {}).values())


def quantizes_inputs(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the inputs of ``node`` have to be quantized."""
    op = operation(graph_module, node)
    return op in QUANTIZED or (isinstance(op, type) and issubclass(op, QuantLayer))


def is_float(node: fx.Node) -> bool:
    """Whether ``node`` has a floating-point tensor on the example."""
    value = node.meta.get("value")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_gridded(node: fx.Node) -> bool:
    """Whether the values of ``node`` can have a grid: they are finite on the example (a mask of
    −Inf has no grid)."""
    value = node.meta["value"]
    return is_float(node) and (value.is_meta or not bool(value.isinf().any()))


def is_convolution(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a quantized convolution, whose output runtimes want quantized."""
    if node.op != "call_module":
        return False
    layer = graph_module.get_submodule(str(node.target))
    function = getattr(layer, "function", None)
    return isinstance(layer, QuantLayer) and (
        isinstance(layer, nn.Conv2d) or function in (F.conv1d, F.conv2d, F.conv3d)
    )


def tensor_inputs(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """The floating-point inputs of ``node`` that have to be quantized."""
    inputs = node.all_input_nodes
    if node.op == "call_module":
        layer = graph_module.get_submodule(str(node.target))
        if isinstance(layer, QuantFunction):
            inputs = inputs[:1]  # the weight has its own grid
    return (source for source in inputs if is_float(source))


def producer(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that computed the values of ``node``, before any transparent operations."""
    while (source := moved_from(graph_module, node)) is not None:
        node = source
    return node


def moved_from(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose values ``node`` only moves; None: it computes."""
    if not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]  # a converted graph has no values to tell tensors by
    if node.target is operator.getitem:
        if operation(graph_module, source) in PARTS:
            return source.all_input_nodes[0]
        # an item of a tuple that is computed is none of a tensor
        return source if node.meta.get("of_tensor", True) else None
    moves = node.meta.get("passes", False) or operation(graph_module, node) in TRANSPARENT
    return source if moves or _pads(node) else None


def _pads(node: fx.Node) -> bool:
    """Whether a call of F.pad adds nothing but 0 and values of its input."""
    if node.target is not F.pad:
        return False
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return value in (None, 0)
