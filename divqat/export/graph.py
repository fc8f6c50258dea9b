"""What has to be mended in an ONNX graph that PyTorch's exporter made."""

from __future__ import annotations

import ast
import copy
from typing import Any

import torch
from torch import fx


def separate_constants(graph: Any) -> None:
    """Give every reader of a weight the weight's codes, their zero point and their DequantizeLinear
    for itself; the exporter merges what is equal, and a layer may be called twice.

    For ``session.x64quantprecision``: ONNX Runtime 1.32 shifts weights and their zero points to
    uint8 one layer at a time, and fails at one that it has shifted before.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    makers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    taken = set()

    def separate(maker: Any) -> None:
        for place in (0, 2):
            name = maker.input[place]
            if name in taken:
                own = graph.initializer.add()
                own.CopyFrom(constants[name])
                own.name = maker.input[place] = f"{maker.output[0]}/{name}"
                constants[own.name] = own
            taken.add(maker.input[place])

    for reader in list(graph.node):
        for place, name in enumerate(reader.input):
            maker = makers.get(name)
            if maker is None or maker.input[0] not in constants:
                continue
            if name in taken:
                again = copy.deepcopy(maker)
                again.name = again.output[0] = reader.input[place] = f"{reader.name}/{name}"
                separate(again)
                graph.node.insert([*graph.node].index(reader), again)
            else:
                separate(maker)
            taken.add(name)


def module_name(node: Any) -> str:
    """The module that a node comes from, as PyTorch's exporter notes it; else the node's name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            *modules, _ = ast.literal_eval(entry.value)
            return modules[-1] if modules and modules[-1] else node.name
    return node.name


def refuse_divisors(graph: fx.Graph) -> None:
    """Refuse an average pooling with a divisor of its own, which the exporter would leave out.

    Raises:
        ValueError: there is one.
    """
    for node in graph.nodes:
        if node.target not in (
            torch.ops.aten.avg_pool2d.default,
            torch.ops.aten.avg_pool3d.default,
        ):
            continue
        divisor = dict(enumerate(node.args)).get(6, node.kwargs.get("divisor_override"))
        if divisor is not None:
            name = [*node.meta["nn_module_stack"].values()][-1][0] or node.name
            raise ValueError(
                f"{name}: divisor_override: wanted None, as ONNX divides by the number of values, "
                f"got {divisor}"
            )


def mend_average_pools(graph: Any) -> None:
    """Leave padding out of the mean in every average pooling with ``ceil_mode``, which changes
    nothing where there is none.

    ONNX Runtime's integer kernel (1.32) otherwise divides by a whole window where that hangs over
    the edge.

    Raises:
        ValueError: one has padding and counts it.
    """
    for node in graph.node:
        attributes = {each.name: each for each in node.attribute}
        wanted = ("ceil_mode", "count_include_pad")
        if node.op_type != "AveragePool" or not all(
            name in attributes and attributes[name].i for name in wanted
        ):
            continue
        if "pads" in attributes and any(attributes["pads"].ints):
            raise ValueError(
                f"{module_name(node)}: count_include_pad: wanted False in an average pooling with "
                "ceil_mode and padding, which ONNX Runtime computes otherwise, got True"
            )
        attributes["count_include_pad"].i = 0
