"""The inputs and outputs of an exported model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from divqat.quantize.checks import as_call


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call for the exporter.

    Attributes:
        values: of all arguments, in order; batches of two, as torch.export specializes one of one.
        names: of the tensors among them.
        dynamic_shapes: the dynamic dimensions of each argument.
    """

    values: tuple[Any, ...]
    names: list[str]
    dynamic_shapes: tuple[Any, ...]


def arguments(model: nn.Module, example_input: Any) -> Arguments:
    """The arguments of ``model`` for an example as of :func:`divqat.prepare`.

    Raises:
        TypeError: a floating-point tensor is not float32.
    """
    args, kwargs = as_call(example_input)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    tensors = {name: v for name, v in bound.arguments.items() if isinstance(v, Tensor)}
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(
                f"example_input: wanted float32, as runtimes compute it, got {tensor.dtype}"
            )
    rows = next((len(tensor) for tensor in tensors.values() if tensor.dim()), 0)
    batch, values, shapes = torch.export.Dim("batch"), [], []
    for value in bound.arguments.values():
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        values.append(torch.cat([value[:1]] * 2) if batched else value)
        shapes.append({0: batch} if batched else {} if isinstance(value, Tensor) else None)
    names = ["images"] if len(tensors) == 1 else list(tensors)
    return Arguments(tuple(values), names, tuple(shapes))


def output_names(converted: nn.Module) -> list[str]:
    """The names of a model's outputs. Dataclasses and the like in a traced model become
    dictionaries, which the exporter knows."""
    if not isinstance(converted, fx.GraphModule):
        return ["logits"]
    output = converted.graph.output_node()
    results = _plain(output.args[0])
    output.args = (results,)
    converted.recompile()
    if isinstance(results, fx.Node):
        return ["logits"]
    return _names(results, "")


def _plain(result: Any) -> Any:
    """An argument of the output node without calls that make a container of a type of its own."""
    if isinstance(result, dict):
        return {key: _plain(value) for key, value in result.items()}
    if isinstance(result, (tuple, list)):
        return [_plain(value) for value in result]
    if isinstance(result, fx.Node) and isinstance(result.target, type):
        (items,) = result.args if len(result.args) == 1 else (None,)
        return _plain(items if isinstance(items, dict) else _items(result))
    return result


def _items(call: fx.Node) -> Any:
    """The arguments of a dataclass or of a named tuple, by name."""
    names = getattr(call.target, "_fields", ())
    return dict(call.kwargs) or dict(zip(names, call.args, strict=True)) or list(call.args)


def _names(results: Any, prefix: str) -> list[str]:
    if isinstance(results, fx.Node):
        return [prefix.removesuffix("_")]
    items = results.items() if isinstance(results, dict) else enumerate(results)
    names = []
    for key, value in items:
        start = f"{prefix}{key}_" if isinstance(key, str) else f"{prefix or 'output_'}{key}_"
        names += _names(value, start)
    return names
