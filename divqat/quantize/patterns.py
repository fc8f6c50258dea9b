"""Properties of the operations of a traced graph, for prepare."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from divqat.nn import QuantConvBn2d
from divqat.nn._layer import QuantLayer

# Operations that only move values: their output is on the same grid as their input.
TRANSPARENT: set[Any] = {
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.Dropout, nn.Dropout2d, nn.PixelShuffle, nn.ChannelShuffle, nn.ZeroPad2d),
    *(F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.dropout, F.pixel_shuffle),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.chunk, torch.split, operator.getitem),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze"),
    *("contiguous", "chunk", "split", "expand"),
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

# Functions whose training flag tracing makes a constant, and modules that follow train().
DROPOUTS: dict[Any, type[nn.Module]] = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}

LAYER_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.bilinear),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)


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
    """Whether shape propagation found a floating-point tensor (or several) at ``node``."""
    meta = node.meta.get("tensor_meta")
    if isinstance(meta, (tuple, list)) and not hasattr(meta, "dtype"):
        meta = meta[0] if meta else None
    return meta is not None and hasattr(meta, "dtype") and meta.dtype.is_floating_point


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The floating-point inputs of ``node``."""
    return (source for source in node.all_input_nodes if is_float(source))


def producer(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that computed the values of ``node``, before any transparent operations."""
    while operation(graph_module, node) in TRANSPARENT:
        node = node.all_input_nodes[0]  # a pickled graph has lost the metadata of tensor_inputs
    return node
