"""Record the operations of a model as a graph, together with their values on an example.

torch.fx traces with proxies that have no values. Those of this package have the values of an
example run, so that a forward may branch on shapes, iterate over lists of tensors, and ask for
types. What depends on the *contents* of a tensor cannot be a graph, and is refused with the line of
code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from divqat._util.modes import modes_kept
from divqat.quantize.tracing.patches import patched
from divqat.quantize.tracing.recorded import Recorded, Untraceable, has_tensor, user_line
from divqat.quantize.tracing.tree import ByMode


class Recorder(fx.Tracer):
    """Records calls of ``root`` into ``graph``.

    A second recording, of the model in another mode, reuses the nodes of the first that do the
    same in the same order, and puts what differs between them: both run in the order of the graph.
    Each node has the modes that have it in ``meta["modes"]``; that of a module that returns its
    input in eval mode, such as stochastic depth, is true in ``meta["passes"]``.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root, self.graph = root, fx.Graph()
        self.proxy_buffer_attributes = True
        self.record_stack_traces = False
        self.constants: dict[str, Tensor] = {}  # tensors that a forward made without proxies
        self.added: dict[str, nn.Module] = {}  # later: the forward may iterate over its modules
        self.lost: dict[str, None] = {}  # what a graph does not keep
        self.paths = {module: name for name, module in root.named_modules()}
        self.submodule_paths = self.paths  # torch.fx's name
        self.mode = ""
        self.evaluating = False
        self._attributes: dict[str, fx.Proxy] = {}
        self._tensors: dict[str, fx.Node] = {}  # nodes that read a tensor of the model
        self._cursor: fx.Node | None = None  # the last node of this recording
        self._grad_enabled = True

    def record(self, mode: str, forward: Callable[[], Any]) -> Any:
        """The result of ``forward`` as an argument of nodes, with its operations in the graph."""
        self.mode, self._attributes, self.num_calls = mode, {}, {}
        self._cursor, self._grad_enabled = None, True
        with patched(self, self._attributes), torch.enable_grad():
            argument = self.create_arg(forward())
        self._check_attributes()
        return argument

    def lose(self, what: str) -> None:
        """Note something at this line that the graph does not keep."""
        self.lost[f"{what} at {user_line()}"] = None

    def proxy(self, node: fx.Node) -> Recorded:
        return Recorded(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is Recorded:
            return a.node
        if isinstance(a, dict) and type(a) is not dict:
            if is_dataclass(a):  # such as the outputs of Hugging Face's models
                return self._call("call_function", type(a), (), dict(a))
            return self._call("call_function", type(a), (dict(a),), {})
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self._call("call_function", type(a), tuple(a), {})
        if is_dataclass(a) and not isinstance(a, type):
            items = {field.name: getattr(a, field.name) for field in fields(a)}
            return self._call("call_function", type(a), (), items)
        if isinstance(a, type):
            return a
        if isinstance(a, Tensor):
            return self._call("get_attr", self._name(a), (), {})
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            raise Untraceable(f"{user_line()} has an {error}") from error

    def _name(self, tensor: Tensor) -> str:
        """The name of a parameter, a buffer, or a tensor that becomes a buffer."""
        for name, other in (*self.root.named_parameters(), *self.root.named_buffers()):
            if other is tensor:
                return name
        for name, other in self.constants.items():
            alike = (other.dtype, other.device) == (tensor.dtype, tensor.device)
            if alike and torch.equal(other, tensor):
                return name
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor.detach().clone()
        self.root.register_buffer(name, self.constants[name], persistent=False)
        return name

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """A node for a call and a proxy for its result, or a container of proxies if the result is
        one of tensors."""
        return self.proxies(self._call(kind, target, args, kwargs, name))

    def _call(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        value: Any = None,  # of a placeholder
    ) -> fx.Node:
        """A node for a call, with its value."""
        if torch.is_grad_enabled() != self._grad_enabled:
            self._grad_enabled = torch.is_grad_enabled()
            self._node("call_function", torch.set_grad_enabled, (self._grad_enabled,), {})
        node = self._node(kind, target, self.create_arg(args), self.create_arg(kwargs), name)
        if kind == "call_method" and target in ("item", "tolist", "numpy"):
            raise Untraceable(f"{user_line()} depends on the contents of a tensor")
        inputs = node.all_input_nodes
        read = inputs[0].meta["value"] if inputs else None
        version = read._version if isinstance(read, Tensor) else None
        if kind != "placeholder":
            value = self._evaluate(node)
        # A module that works in place returns its input, too, but overwritten.
        node.meta["passes"] = (
            kind == "call_module" and value is read is not None and read._version == version
        )
        # Detached, so that operations in place work as under no_grad.
        node.meta["value"] = pytree.tree_map_only(Tensor, Tensor.detach, value)
        node.meta["of_tensor"] = version is not None
        return node

    def _node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None
    ) -> fx.Node:
        """The next node of the graph that is the same call, else a new one. Tensors of the model
        are read at the start, in any order."""
        if kind == "get_attr":
            return self._read(target)
        start = self._cursor.next if self._cursor else next(iter(self.graph.nodes), None)
        others = []  # of the other mode
        while start is not None and start.op != "root":
            if self.mode not in start.meta["modes"]:
                others.append(start)
            start = start.next
        call = kind, target, args, kwargs
        node = next((n for n in others if (n.op, n.target, n.args, n.kwargs) == call), None)
        if node is None:
            similar = next((n for n in others if (n.op, n.target) == (kind, target)), None)
            node = similar if similar is not None and self._by_mode(similar, *call) else None
        if node is None:
            with self.graph.inserting_after(self._cursor):
                node = self.create_node(kind, target, args, kwargs, name)
            node.meta["modes"] = set()
        node.meta["modes"] = node.meta["modes"] | {self.mode}
        self._cursor = node
        return node

    def _read(self, target: str) -> fx.Node:
        node = self._tensors.get(target)
        if node is None:
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self._tensors[target] = self.create_node("get_attr", target, (), {})
            node.meta["modes"] = set()
        node.meta["modes"] = node.meta["modes"] | {self.mode}
        return node

    def _by_mode(self, node: fx.Node, kind: str, target: Any, args: Any, kwargs: Any) -> bool:
        """Let ``node`` serve both modes if they call it with the same tensors and other numbers."""
        if (node.op, node.target) != (kind, target) or kind in ("placeholder", "get_attr"):
            return False
        old, old_tree = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
        new, new_tree = pytree.tree_flatten((list(args), dict(kwargs)))
        pairs = list(zip(old, new, strict=False))
        different = [i for i, (a, b) in enumerate(pairs) if type(a) is not type(b) or a != b]
        numbers = all(not isinstance(x, fx.Node) for i in different for x in pairs[i])
        if old_tree != new_tree or not different or not numbers:
            return False
        for i in different:
            name = f"by_mode.{node.name}_{i}"
            self.added[name] = ByMode(*pairs[i])
            with self.graph.inserting_before(node):
                switch = self.create_node("call_module", name, (), {})
            switch.meta |= {"modes": {"eval", "train"}, "value": pairs[i][0]}
            old[i] = switch
        items, named = pytree.tree_unflatten(old, old_tree)
        node.args, node.kwargs = tuple(items), named
        return True

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: source.meta["value"])
        self.evaluating = True
        try:
            if node.op == "get_attr":
                *path, name = str(node.target).split(".")
                return getattr(self.root.get_submodule(".".join(path)), name)
            if node.op == "call_module":
                return _in_eval(self.submodule(str(node.target)), args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.evaluating = False

    def placeholder(self, target: str, default: tuple[Any, ...], value: Any) -> fx.Node:
        """The node of an argument with this value on the example."""
        return self._call("placeholder", target, default, {}, value=value)

    def submodule(self, name: str) -> nn.Module:
        """The module that a node of this name calls."""
        return self.added[name] if name in self.added else self.root.get_submodule(name)

    def proxies(self, node: fx.Node) -> Any:
        """A proxy of ``node``, or a container like its value if that has tensors; None for None."""
        proxy, value = self.proxy(node), node.meta["value"]
        if value is None:
            return None
        if type(value) is dict and has_tensor(value):
            return {key: self._item(proxy, key) for key in value}
        if isinstance(value, (tuple, list)) and has_tensor(value):
            items = [self._item(proxy, index) for index in range(len(value))]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return proxy

    def _item(self, proxy: Recorded, index: Any) -> Any:
        return self.create_proxy("call_function", operator.getitem, (proxy, index), {})

    def _check_attributes(self) -> None:
        """Check that the forward has stored no proxy in the model, which a graph would not do."""
        for path, module in self.root.named_modules():
            for name, value in {**module.__dict__, **module._buffers}.items():
                if type(value) is Recorded:
                    raise Untraceable(
                        f"{type(module).__name__}.forward of {path or 'the model'!r} assigns the "
                        f"attribute {name!r}"
                    )


def _in_eval(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A call in eval mode: shapes are those of training mode, and no statistics move."""
    with modes_kept(module):
        for m in module.modules():
            m.training = False
        return module(*args, **kwargs)
