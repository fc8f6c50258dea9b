"""Calls that a model makes in both modes, but with other inputs in training mode."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from divqat.nn._layer import QuantLayer


def only_in_training(node: fx.Node) -> bool:
    """Whether a node of the graph of both modes is one of training mode alone."""
    return bool(node.meta.get("modes") == {"train"})


def twins(graph_module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The node of eval mode for each node of training mode alone that does the same.

    Where a model adds noise in training, all that follows has another input in each mode, and is in
    the graph twice. Two calls of a layer are the same if it is called equally often in both modes,
    in order; other operations are the same if all of their inputs are. Noise has no twin.
    """
    layers = {mode: defaultdict[Any, list[fx.Node]](list) for mode in ("train", "eval")}
    others = defaultdict[Any, list[fx.Node]](list)  # of eval mode, by operation and inputs
    for node in graph_module.graph.nodes:
        if len(node.meta.get("modes", ())) != 1 or node.op == "output":
            continue
        (mode,) = node.meta["modes"]
        if is_layer(graph_module, node):
            layers[mode][node.target].append(node)
        elif mode == "eval":
            others[_key(node, {})].append(node)
    found: dict[fx.Node, fx.Node] = {}
    for target, calls in layers["train"].items():
        if len(calls) == len(layers["eval"][target]):
            found.update(zip(calls, layers["eval"][target], strict=True))
    for node in graph_module.graph.nodes:
        if only_in_training(node) and node.all_input_nodes and node not in found:
            same = others[_key(node, found)]
            if same:
                found[node] = same.pop(0)
    return found


def is_layer(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a quantized layer."""
    if node.op != "call_module":
        return False
    return isinstance(graph_module.get_submodule(str(node.target)), QuantLayer)


def _key(node: fx.Node, found: dict[fx.Node, fx.Node]) -> tuple[Any, ...]:
    """The operation and its inputs, those of training mode replaced by their twins."""
    inputs = fx.node.map_arg((node.args, node.kwargs), lambda source: found.get(source, source))
    return node.op, node.target, repr(inputs)
