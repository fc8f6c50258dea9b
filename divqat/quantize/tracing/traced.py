"""A traced model that keeps its class, attributes and hooks, and the graph of each mode."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import map_aggregate

from divqat.quantize.floats import FloatLayer, float_layers


class PreparedModule(fx.GraphModule):
    """The result of :func:`divqat.prepare` for a model that it can trace.

    It has the modules, parameters, hooks, attributes and methods of the model, and is an instance
    of its class (unless that is one of torch). Only its forward is that of a graph: the one of
    ``graph``, and in training mode another one if the two modes do different things.

    Unlike other GraphModules, deep copies and pickles keep all of this. ``meta`` keeps the float
    layers at the time of ``prepare``, to detect layers that are added later.
    """

    _train_graph: fx.Graph | None = None

    @classmethod
    def of(cls, model: nn.Module, graph: fx.Graph) -> PreparedModule:
        """``graph`` over the modules of ``model``, which it takes over."""
        traced = cls(nn.Module(), fx.Graph())
        traced.__class__ = _class(type(model))
        traced.__dict__.update(model.__dict__)
        traced.graph = graph
        return traced

    def set_graphs(self, train: fx.Graph, evaluate: fx.Graph) -> None:
        """Set the graphs of the two modes."""
        self._train_graph = None if train is evaluate else train
        self.graph = evaluate

    def recompile(self) -> Any:
        code = super().recompile()
        if self._train_graph is not None:
            python = self._train_graph.python_code("self")
            names = dict(python.globals)
            exec(compile(python.src, "<graph of training mode>", "exec"), names)
            cls: Any = type(self)
            cls.forward = _by_mode(names["forward"], cls.forward)
        return code

    def remember_float_layers(self) -> None:
        """Record the layers that are in float now."""
        self.meta["float_layers"] = float_layers(self)

    def new_float_layers(self) -> list[FloatLayer]:
        """The float layers that were added since."""
        known = self.meta["float_layers"]
        return [layer for layer in float_layers(self) if layer not in known]

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModule:
        new = object.__new__(PreparedModule)
        new.__class__ = _class(_base(self))
        memo[id(self)] = new
        state, graphs = _split(self)
        new.__dict__.update(copy.deepcopy(state, memo))
        return _with_graphs(new, graphs)

    def __reduce__(self) -> tuple[Any, ...]:
        state, graphs = _split(self)
        return _unpickled, (_base(self),), (state, graphs), None, None, _restore


def _by_mode(train: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(evaluate)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (train if self.training else evaluate)(self, *args, **kwargs)

    return forward


def _class(base: type) -> type:
    """A class for one instance: its forward is that of its graph."""
    of_torch = base.__module__.partition(".")[0] == "torch" or issubclass(base, fx.GraphModule)
    bases = (PreparedModule,) if of_torch else (PreparedModule, base)
    return type(base.__name__, bases, {"__module__": base.__module__, "_base": base})


def _base(model: PreparedModule) -> type:
    return type(model)._base  # type: ignore[attr-defined]


class _Ref(NamedTuple):
    """The node of a position in a graph."""

    position: int


def _split(model: PreparedModule) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """The attributes of a model without its graphs, and these as plain data."""
    state = {k: v for k, v in model.__dict__.items() if k not in ("_graph", "_train_graph")}
    train = model._train_graph
    return state, (None if train is None else _rows(train), _rows(model.graph))


def _with_graphs(model: PreparedModule, graphs: tuple[Any, Any]) -> PreparedModule:
    train, evaluate = (None if rows is None else _graph(rows) for rows in graphs)
    assert evaluate is not None
    model.set_graphs(evaluate if train is None else train, evaluate)
    return model


class _Function(NamedTuple):
    """A function that pickle does not find by its qualified name, such as F.max_pool2d."""

    module: str
    name: str


def _target(target: Any) -> Any:
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    module, name = str(target.__module__), str(target.__name__)
    found = getattr(sys.modules.get(module), name, None) is target
    return _Function(module, name) if found else target


def _rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph as plain data."""
    index = {node: _Ref(i) for i, node in enumerate(graph.nodes)}

    def plain(a: Any) -> Any:
        return index[a] if isinstance(a, fx.Node) else a

    return [
        (
            *(node.op, _target(node.target), map_aggregate(node.args, plain)),
            *(map_aggregate(node.kwargs, plain), node.name),
            {key: node.meta[key] for key in ("of_tensor", "passes") if key in node.meta},
        )
        for node in graph.nodes
    ]


def _graph(rows: list[tuple[Any, ...]]) -> fx.Graph:
    graph, nodes = fx.Graph(), list[fx.Node]()

    def node_of(a: Any) -> Any:
        if isinstance(a, _Ref):
            return nodes[a.position]
        if isinstance(a, (list, dict)):
            items = a.items() if isinstance(a, dict) else enumerate(a)
            changed = {key: node_of(item) for key, item in items}
            return changed if isinstance(a, dict) else list(changed.values())
        if isinstance(a, tuple):
            changed_items = [node_of(item) for item in a]
            return type(a)(*changed_items) if hasattr(a, "_fields") else tuple(changed_items)
        if isinstance(a, slice):
            return slice(*map(node_of, (a.start, a.stop, a.step)))
        return a

    for op, target, args, kwargs, name, meta in rows:
        if isinstance(target, _Function):
            target = getattr(importlib.import_module(target.module), target.name)
        nodes.append(graph.create_node(op, target, node_of(args), node_of(kwargs), name))
        nodes[-1].meta.update(meta)
    return graph


def _unpickled(base: type) -> PreparedModule:
    new = object.__new__(PreparedModule)
    new.__class__ = _class(base)
    return new


def _restore(model: PreparedModule, state: tuple[dict[str, Any], tuple[Any, Any]]) -> None:
    attributes, graphs = state
    model.__dict__.update(attributes)
    _with_graphs(model, graphs)


def rename_keys(model: nn.Module, names: dict[str, str]) -> None:
    """Give tensors of ``model`` other names in its state dict, and load them under both.

    Args:
        model: the prepared model.
        names: name in the float model → name of the module's attribute now; both may be prefixes
            that end with a dot.
    """
    if names:
        model.register_load_state_dict_pre_hook(partial(_rename_loaded, names))
        model._register_state_dict_hook(partial(_rename_saved, names))


def _renamed(key: str, names: dict[str, str]) -> str:
    """``key`` with the longest of the old names that it has replaced."""
    found = [old for old in names if key == old or (old.endswith(".") and key.startswith(old))]
    longest = max(found, key=len, default=None)
    return key if longest is None else names[longest] + key[len(longest) :]


def _rename_loaded(
    names: dict[str, str], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        new = prefix + _renamed(key[len(prefix) :], names)
        if new != key:
            state_dict[new] = state_dict.pop(key)


def _rename_saved(
    names: dict[str, str], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    back = {new: old for old, new in names.items()}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        new = prefix + _renamed(key[len(prefix) :], back)
        if new != key:
            state_dict[new] = state_dict.pop(key)
