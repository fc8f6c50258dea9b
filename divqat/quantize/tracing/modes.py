"""Capture a model in both modes, check that the graph does the same, and split it by mode."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from divqat._util.modes import modes_kept
from divqat.quantize.checks import as_call
from divqat.quantize.tracing.capture import STATISTICS, Capture
from divqat.quantize.tracing.recorded import Untraceable
from divqat.quantize.tracing.traced import PreparedModule
from divqat.quantize.tracing.tree import add_module

MODES = ("eval", "train")
STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
# What a graph may compute without use: reads of attributes, items and sizes.
READS = (getattr, "size", "dim")


def capture(model: nn.Module, example_input: Any) -> tuple[PreparedModule, dict[str, str]]:
    """``model`` as a graph of both modes; it takes over the model's modules.

    The forward is recorded in eval and in training mode. Nodes have their modes in
    ``meta["modes"]``, and the output node has the results by mode; :func:`split` makes two graphs
    of it. The graph's results are compared with the model's in both modes, and in eval mode for
    another number of images, too.

    Args:
        model: any module; changed.
        example_input: see :func:`divqat.prepare`.

    Returns:
        The traced model, and new names of tensors by their old ones.

    Raises:
        Untraceable: no graph does the same.
    """
    call = _at_least_two(as_call(example_input))
    expected = {mode: tensors_of(model, call, mode) for mode in MODES}
    fewer = _one_less(call)
    expected_of_fewer = None if fewer is None else tensors_of(model, fewer, "eval")
    recorder = Capture(model)
    results = {}
    for mode in MODES:
        with _mode(model, mode):
            results[mode] = recorder.record(mode, lambda: _forward(recorder, model, call))
    for path, module in recorder.added.items():
        add_module(model, path, module)
    recorder.graph.output(results)
    _drop_reads(recorder.graph)
    names = _install_norms(model, recorder)
    traced = PreparedModule.of(model, recorder.graph)
    _check(traced, call, expected, fewer, expected_of_fewer)
    if recorder.lost:
        warnings.warn("a prepared model does not keep " + ", ".join(recorder.lost), stacklevel=3)
    return traced, names


def _check(
    traced: PreparedModule, call: Any, expected: dict[str, Any], fewer: Any, of_fewer: Any
) -> None:
    """Check that the graphs compute what the model did."""
    union = traced.graph
    split(traced)
    for mode, result in expected.items():
        if result is not None and not same_tensors(tensors_of(traced, call, mode), result):
            raise Untraceable(f"its graph has other results in {mode} mode")
    if of_fewer is not None and not same_tensors(tensors_of(traced, fewer, "eval"), of_fewer):
        raise Untraceable("its graph depends on the number of images")
    traced._train_graph, traced.graph = None, union


def split(traced: PreparedModule) -> None:
    """Give a traced model one graph for each mode, or for both if they are the same."""
    union = traced.graph
    results: Any = union.output_node().args[0]
    nodes = [node for node in union.nodes if node.op != "output"]
    graphs = {}
    for mode in MODES:
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in nodes:
            if mode in node.meta["modes"]:
                env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(fx.node.map_arg(results[mode], env.__getitem__))
        graphs[mode] = graph
    same = results["eval"] == results["train"] and all(
        node.meta["modes"] == {*MODES} for node in nodes
    )
    traced.set_graphs(graphs["eval"] if same else graphs["train"], graphs["eval"])


def _forward(recorder: Capture, model: nn.Module, call: tuple[Any, Any]) -> Any:
    """The forward of placeholders for its tensors; numbers, None and the like are as they are, with
    a check that later calls have the same."""
    args, kwargs = call
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        stars = STARS.get(parameter.kind, "")
        if stars == "**" and value:
            raise Untraceable(f"its forward takes **{name}")
        default = () if parameter.default is parameter.empty else (parameter.default,)
        tensors = pytree.tree_map_only(Tensor, Tensor.clone, value)
        node = recorder.placeholder(f"{stars}{name}", default, tensors)
        if any(True for _ in _tensors(value)):
            bound.arguments[name] = recorder.proxies(node)
        else:
            check = recorder.proxy(node), value, name
            recorder.create_proxy("call_function", _check_constant, check, {})
    return model.forward(*bound.args, **bound.kwargs)


def _check_constant(got: Any, wanted: Any, name: str) -> None:
    """Check an argument that the graph has as a constant."""
    if got is not wanted and got != wanted:
        raise ValueError(
            f"{name}: wanted {wanted!r}, as in the example_input of prepare, got {type(got)}"
        )


def _install_norms(model: nn.Module, recorder: Capture) -> dict[str, str]:
    """Put in the BatchNorm modules that were found; returns new names of their tensors."""
    names = {}
    used = {str(node.target) for node in recorder.graph.nodes if node.op == "get_attr"}
    for path, (norm, tensors) in recorder.norms.items():
        for attribute, name in zip(STATISTICS, tensors, strict=True):
            prefix, _, leaf = name.rpartition(".")
            if not name or prefix == path:
                continue
            if name in used:
                raise Untraceable(f"{name} belongs to a BatchNorm and is used elsewhere")
            holder = model.get_submodule(prefix)
            (holder._parameters if leaf in holder._parameters else holder._buffers).pop(leaf)
            names[name] = f"{path}.{attribute}"
        add_module(model, path, norm)
    return names


def _drop_reads(graph: fx.Graph) -> None:
    """Erase nodes that only read something that nothing uses."""
    for node in reversed(graph.nodes):
        reads = node.op == "get_attr" or node.target in (*READS, operator.getitem)
        if reads and not node.users:
            graph.erase_node(node)


def _at_least_two(call: tuple[Any, Any]) -> tuple[Any, Any]:
    """A call with two images instead of one: BatchNorm in training mode may need two."""
    size = _batch_size(call)
    return _map_batch(call, 1, lambda t: torch.cat([t, t])) if size == 1 else call


def _one_less(call: tuple[Any, Any]) -> tuple[Any, Any] | None:
    size = _batch_size(call)
    return None if size is None else _map_batch(call, size, lambda t: t[:-1])


def _batch_size(call: tuple[Any, Any]) -> int | None:
    return next((len(t) for t in _tensors(call) if t.dim()), None)


def _map_batch(call: Any, size: int, function: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda t: function(t) if t.dim() and len(t) == size else t, call
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


@contextmanager
def _mode(model: nn.Module, mode: str) -> Iterator[None]:
    """A block in a mode, after which buffers, modes and the state of random numbers are as
    before."""
    kept = [(m, name, b, b.clone()) for m in model.modules() for name, b in _buffers(m)]
    devices = {t.device for t in model.buffers()} | {t.device for t in model.parameters()}
    try:
        with modes_kept(model), torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            torch.manual_seed(0)
            model.train(mode == "train")
            yield
    finally:
        for module, name, buffer, value in kept:
            module._buffers[name] = buffer
            buffer.copy_(value)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, b) for name, b in module._buffers.items() if b is not None]


def tensors_of(model: nn.Module, call: tuple[Any, Any], mode: str) -> Any:
    """The tensors that a call returns; None: it raises."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, call)
    dropouts = [m for m in model.modules() if isinstance(m, _DropoutNd)]
    shares = [dropout.p for dropout in dropouts]
    with _mode(model, mode), torch.no_grad():
        try:
            for dropout in dropouts:
                dropout.p = 0.0  # what it drops depends on the order of values in memory
            return list(_tensors(model(*args, **kwargs)))
        except Exception:  # the model's forward may raise anything
            return None
        finally:
            for dropout, share in zip(dropouts, shares, strict=True):
                dropout.p = share


def same_tensors(got: list[Tensor] | None, wanted: list[Tensor]) -> bool:
    """Whether tensors are the same but for the order of sums."""
    if got is None or len(got) != len(wanted):
        return False
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and (
            a.is_meta
            or torch.allclose(
                a.double(), b.double(), rtol=1e-3, atol=1e-4 * _largest(b), equal_nan=True
            )
        )
        for a, b in zip(got, wanted, strict=True)
    )


def _largest(tensor: Tensor) -> float:
    finite = tensor.double()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
