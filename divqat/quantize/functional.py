"""Functions that multiply by a weight become layers."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from divqat.nn.function import QuantFunction, matmul
from divqat.quantize.config import QuantConfig
from divqat.quantize.floats import FloatLayer
from divqat.quantize.patterns import scopes
from divqat.quantize.tracing import PreparedModule
from divqat.quantize.tracing.tree import add_module, get_tensor

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONV[:5], "output_padding", "groups", "dilation")
MATMULS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.matmul, operator.matmul, "matmul", torch.mm, "mm"), _CONV[:2]),
    torch.addmm: ("bias", "input", "weight"),
}
# function → names of its arguments, axis of the weight's output channels
PRODUCTS: dict[Any, tuple[tuple[str, ...], int]] = {
    F.linear: (_CONV[:3], 0),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (_CONV, 0)),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), (_CONV, 0)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), (_TRANSPOSED, 1)),
    **{function: (names, 1) for function, names in MATMULS.items()},
}
# With a weight, these stay in float.
OTHER_PRODUCTS = (
    *(F.bilinear, torch.einsum, torch.tensordot, torch.mv),
    *(torch.bmm, "bmm", torch.baddbmm, "baddbmm", "addmm"),
)
LAYERS = {F.linear: nn.Linear, F.conv2d: nn.Conv2d, torch.conv2d: nn.Conv2d}


def lift_functions(graph_module: fx.GraphModule, config: QuantConfig) -> None:
    """Replace functions whose weight is computed from parameters alone.

    The function of a layer's own forward becomes the layer of torch.nn with the same parameters
    (``Conv2d`` with another padding); any other one a :class:`divqat.nn.QuantFunction`.
    """
    constant = constants(graph_module.graph)
    for node in list(graph_module.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in PRODUCTS:
            continue
        if any(config.skips(name) for name in scopes(node)):
            continue
        names, axis = PRODUCTS[node.target]
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        x, weight = arguments.pop("input"), arguments.pop("weight")
        bias = arguments.pop("bias", None)
        if not isinstance(weight, fx.Node) or weight not in constant or x in constant:
            continue
        shape = weight.meta["value"].shape
        if node.target in MATMULS and (len(shape) != 2 or arguments):
            continue
        if _becomes_layer(graph_module, node, x, weight, bias, arguments):
            continue
        function = matmul if node.target in MATMULS else node.target
        layer = QuantFunction(function, shape, axis, weight_spec=config.weight)
        name = f"functional.{node.name}"
        add_module(graph_module, name, layer.to(weight.meta["value"].device))
        node.op, node.target = "call_module", name
        node.args, node.kwargs = (x, weight, bias), arguments


def _becomes_layer(
    graph_module: fx.GraphModule,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    options: dict[str, Any],
) -> bool:
    """Replace a subclass of a layer of torch.nn by the layer if ``node`` is all that it does with
    its weight."""
    path, _, name = str(weight.target).rpartition(".")
    kind = LAYERS.get(node.target)  # type: ignore[arg-type]
    if kind is None or weight.op != "get_attr" or not path or len(weight.users) != 1:
        return False
    owner = graph_module.get_submodule(path)
    own_bias = bias is None or (bias.op == "get_attr" and bias.target == f"{path}.bias")
    tensors = {*owner._parameters, *owner._buffers}
    if name != "weight" or not own_bias or tensors - {"weight", "bias"} or owner._modules:
        return False
    if any(isinstance(option, fx.Node) for option in options.values()):
        return False
    value, groups = weight.meta["value"], options.get("groups", 1)
    layer: Any
    if kind is nn.Linear:
        layer = nn.Linear(value.shape[1], value.shape[0], bias is not None, device="meta")
    else:
        sizes = groups * value.shape[1], value.shape[0], tuple(value.shape[2:])
        layer = nn.Conv2d(*sizes, bias=bias is not None, device="meta", **options)
    layer.weight = get_tensor(graph_module, str(weight.target))
    if bias is not None:
        layer.bias = get_tensor(graph_module, str(bias.target))
    layer.training = owner.training
    graph_module.set_submodule(path, layer)
    node.op, node.target, node.args, node.kwargs = "call_module", path, (x,), {}
    return True


def float_functions(graph_module: fx.GraphModule, config: QuantConfig) -> list[FloatLayer]:
    """The functions that multiply by a parameter in another way than a layer, and convolutions
    whose weight is computed from the input."""
    constant, found = constants(graph_module.graph), []
    for node in graph_module.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node in constant or any(config.skips(name) for name in scopes(node)):
            continue
        kind = node.target if isinstance(node.target, str) else node.target.__name__
        factors = node.all_input_nodes
        if node.target in (*PRODUCTS, *OTHER_PRODUCTS) and constant.intersection(factors):
            found.append(FloatLayer(node.name, kind, "write it as F.linear or F.conv2d"))
        elif node.target in PRODUCTS and "conv" in kind:
            reason = "its weight depends on the input; name it in skip"
            found.append(FloatLayer(node.name, kind, reason))
    return found


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are computed from parameters and buffers alone."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op in ("call_function", "call_method")
            and node.all_input_nodes
            and constant.issuperset(node.all_input_nodes)
        ):
            constant.add(node)
    return constant


@torch.no_grad()
def constant_value(graph_module: fx.GraphModule, node: Any) -> Any:
    """The value of an argument that is computed from parameters and buffers alone."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return get_tensor(graph_module, str(node.target)).detach()
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda source: constant_value(graph_module, source)
    )
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


@contextmanager
def weights_known(model: nn.Module) -> Iterator[None]:
    """Every :class:`divqat.nn.QuantFunction` of eval mode has the weight of its call meanwhile."""
    layers = []
    for module in model.modules():
        if isinstance(module, PreparedModule):
            layers += [layer for layer, _ in _with_weights(module)]
    try:
        yield
    finally:
        for layer in layers:
            layer.weight = layer.bias = None


def _with_weights(graph_module: fx.GraphModule) -> list[tuple[QuantFunction, fx.Node]]:
    """The functions of a graph, with their weights, and their nodes."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        layer = graph_module.get_submodule(str(node.target))
        if isinstance(layer, QuantFunction):
            values = [constant_value(graph_module, argument) for argument in node.args[1:]]
            layer.weight, layer.bias = (v.clone() if isinstance(v, Tensor) else v for v in values)
            found.append((layer, node))
    return found


def fix_weights(graph_module: fx.GraphModule) -> None:
    """Compute the weights of all :class:`divqat.nn.QuantFunction` and take their computation out of
    the graph: for deployment."""
    for _, node in _with_weights(graph_module):
        x, weight, bias = node.args
        node.args = (x,)
        for argument in (weight, bias):
            _erase(graph_module.graph, argument)
    _fix_reads(graph_module)
    graph_module.recompile()


def _fix_reads(graph_module: fx.GraphModule) -> None:
    """Make constants of what a forward asks of its parameters, such as their dtype: a converted
    layer has integers in their place."""
    constant = constants(graph_module.graph)
    for node in list(graph_module.graph.nodes):
        if node.target is not getattr or node.args[0] not in constant:
            continue
        value = constant_value(graph_module, node)
        for user in list(node.users):
            _replace_argument(user, node, value)
        _erase(graph_module.graph, node)


def _replace_argument(user: fx.Node, node: fx.Node, value: Any) -> None:
    """Give ``user`` a constant instead of a node."""

    def constant(source: fx.Node) -> Any:
        return value if source is node else source

    user.args = fx.node.map_arg(user.args, constant)
    user.kwargs = fx.node.map_arg(user.kwargs, constant)


def _erase(graph: fx.Graph, node: Any) -> None:
    """Erase a constant that nothing uses, and those that only it uses."""
    if not isinstance(node, fx.Node) or node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        _erase(graph, source)
