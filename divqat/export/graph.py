"""Corrections of the ONNX graphs of PyTorch's exporter."""

from __future__ import annotations

import ast
import copy
from typing import Any

import torch
from torch import fx


def separate_constants(graph: Any) -> None:
    """Give every consumer of a weight separate codes, zero point and DequantizeLinear. They may be
    shared because the exporter merges equal constants, or because a layer is called twice.

    ``session.x64quantprecision`` needs this: ONNX Runtime 1.32 shifts weights and their zero points
    to uint8 one layer at a time, and fails at one that is already shifted.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    producers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    used = set()

    def separate(producer: Any) -> None:
        for index in (0, 2):
            name = producer.input[index]
            if name in used:
                duplicate = graph.initializer.add()
                duplicate.CopyFrom(constants[name])
                duplicate.name = producer.input[index] = f"{producer.output[0]}/{name}"
                constants[duplicate.name] = duplicate
            used.add(producer.input[index])

    nodes = []
    for consumer in graph.node:
        for index, name in enumerate(consumer.input):
            producer = producers.get(name)
            if producer is None or producer.input[0] not in constants:
                continue
            if name in used:
                again = copy.deepcopy(producer)
                again.name = again.output[0] = consumer.input[index] = f"{consumer.name}/{name}"
                separate(again)
                nodes.append(again)
            else:
                separate(producer)
            used.add(name)
        nodes.append(consumer)
    added = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(added)


def drop_stack_traces(graph: Any) -> None:
    """Drop the exporter's stack traces, which show where files are on the exporting machine."""
    for node in graph.node:
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def module_name(node: Any) -> str:
    """The module of a node, from the metadata of PyTorch's exporter; else the node's name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            *modules, _ = ast.literal_eval(entry.value)
            return modules[-1] if modules and modules[-1] else node.name
    return node.name


def check_divisors(graph: fx.Graph) -> None:
    """Check that no average pooling has a ``divisor_override``, which the exporter would drop.

    Raises:
        ValueError: one has.
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


def fix_average_pools(graph: Any) -> None:
    """Clear ``count_include_pad`` of every average pooling with ``ceil_mode``, which changes
    nothing if there is no padding.

    With it, ONNX Runtime's integer kernel (1.32) divides by the whole window even where the window
    extends beyond the edge.

    Raises:
        ValueError: one has padding and counts it.
    """
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        flags = ("ceil_mode", "count_include_pad")
        if node.op_type != "AveragePool" or not all(
            name in attributes and attributes[name].i for name in flags
        ):
            continue
        if "pads" in attributes and any(attributes["pads"].ints):
            raise ValueError(
                f"{module_name(node)}: count_include_pad: wanted False in an average pooling with "
                "ceil_mode and padding, which ONNX Runtime computes differently, got True"
            )
        attributes["count_include_pad"].i = 0
