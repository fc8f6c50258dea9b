"""What prepare knows about the operations of a traced graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from divqat.nn import QuantConvBn2d
from divqat.nn._layer import QuantLayer

# Operations that hand values on unchanged: what was on a grid before is on it afterwards.
TRANSPARENT: set[Any] = {
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.Dropout, nn.Dropout2d, nn.PixelShuffle, nn.ChannelShuffle, nn.ZeroPad2d),
    *(F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.dropout, F.pixel_shuffle),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.chunk, torch.split, operator.getitem),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze"),
    *("contiguous", "chunk", "split", "expand"),
}

# Operations that want every input on a grid, beside the quantized layers themselves. ReLU and
# ReLU6 are not among them: runtimes merge those into the layer before, with no grid in between.
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

# Functions that tracing ties to the mode of the moment, and the modules that follow train().
DROPOUTS: dict[Any, type[nn.Module]] = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}

LAYER_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.bilinear),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)


def kind(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a node calls: a module's type, a function, or a method's name."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target)))
    return node.target if node.op in ("call_function", "call_method") else None


def is_inplace(graph_module: fx.GraphModule, relu: fx.Node) -> bool:
    """Whether a ReLU writes over its input."""
    if relu.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(relu.target)), "inplace", False))
    if relu.target in (F.relu_, torch.relu_, "relu_"):
        return True
    return bool(relu.kwargs.get("inplace") or relu.args[1:2] == (True,))


def scopes(node: fx.Node) -> Iterator[str]:
    """The names of the modules whose forward ``node`` was traced in, its own included."""
    return (name for name, _ in node.meta.get("nn_module_stack", {}).values())


def wants_grid(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the inputs of ``node`` are to be quantized."""
    what = kind(graph_module, node)
    return what in QUANTIZED or (isinstance(what, type) and issubclass(what, QuantLayer))


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
    """Walk back through transparent operations to what computed the values of ``node``."""
    while kind(graph_module, node) in TRANSPARENT:
        node = node.all_input_nodes[0]  # a pickled graph no longer knows what is a float tensor
    return node
