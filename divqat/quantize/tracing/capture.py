"""A model as one graph that does the same in training and in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from divqat.quantize.tracing.attention import attention, can_decompose
from divqat.quantize.tracing.hooks import PostHooks, PreHooks, has_other_hooks
from divqat.quantize.tracing.recorded import Recorded, Untraceable, user_line
from divqat.quantize.tracing.recorder import Recorder
from divqat.quantize.tracing.tree import get_tensor

# Modules of torch.nn with layers inside.
COMPOSED = (
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
# Layers without a quantized module, whose function is a :class:`divqat.nn.QuantFunction`.
AS_FUNCTIONS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
STATISTICS = ("running_mean", "running_var", "weight", "bias")


class Capture(Recorder):
    """Records a model module by module.

    Modules of torch.nn are nodes, and so are modules without layers whose forward asks for the mode
    (stochastic depth, noise). A BatchNorm is a node in every spelling: as ``F.batch_norm``, and
    within a subclass with a forward of its own, whose other operations become nodes beside it.

    Attributes:
        norms: BatchNorm modules to put in by name, with the names of their tensors so far.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.norms: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*COMPOSED, *AS_FUNCTIONS)) or (
            type(m) is nn.MultiheadAttention and can_decompose(m)
        ):
            return False
        forward = next(cls for cls in type(m).__mro__ if "forward" in vars(cls))
        if forward.__module__.startswith("torch.nn") or isinstance(m, torch.jit.ScriptModule):
            return True
        code = getattr(vars(forward)["forward"], "__code__", None)
        asks = code is not None and "training" in code.co_names
        return asks and not any(True for _ in m.parameters()) and not any(m.children())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if m not in self.paths:
            raise Untraceable(
                f"{user_line()} calls a {type(m).__name__} that is not registered in the model"
            )
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        if has_other_hooks(m):
            raise Untraceable(
                f"{self.path_of_module(m)} ({type(m).__name__}) has hooks of its backward pass or "
                "with keyword arguments"
            )
        inner: Callable[..., Any] = m.forward
        if type(m) is nn.MultiheadAttention:
            inner = partial(attention, m)
        elif isinstance(m, _BatchNorm):
            inner = partial(self._in_eval, m)
        path = f"hooks.{self.path_of_module(m)}"
        if m._forward_pre_hooks:
            args = self._call_hooks(f"{path}.before", PreHooks(m), args)
        result = super().call_module(m, inner, args, kwargs)
        if m._forward_hooks:
            result = self._call_hooks(f"{path}.after", PostHooks(m), (args, result))
        return result

    def _call_hooks(self, path: str, module: nn.Module, args: Any) -> Any:
        self.added[path] = module
        return self.create_proxy("call_module", path, args, {})

    def _in_eval(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The trace of a BatchNorm with a forward of its own: its F.batch_norm becomes a module,
        which knows the mode, and counts the batches."""
        training, m.training = m.training, False
        try:
            return m.forward(*args, **kwargs)
        finally:
            m.training = training

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        if target is F.batch_norm:
            call = inspect.signature(F.batch_norm).bind(*args, **kwargs)
            call.apply_defaults()
            if (name := self._batch_norm(**call.arguments)) is not None:
                return super().create_proxy("call_module", name, args[:1], {})
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def _batch_norm(
        self,
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any,
        bias: Any,
        training: bool,
        momentum: float,
        eps: float,
    ) -> str | None:
        """The name of a BatchNorm module for a call of F.batch_norm, which must follow the mode and
        have tensors of the model; else None."""
        given = (running_mean, running_var, weight, bias)
        path, _ = next(reversed(self.module_stack.values()), ("", None))
        owner = self.root.get_submodule(path)
        # That of a BatchNorm module is traced in eval mode.
        follows = isinstance(owner, _BatchNorm) or training == (self.mode == "train")
        tensors = [t.node for t in given if type(t) is Recorded and t.node.op == "get_attr"]
        if not follows or len(tensors) != sum(t is not None for t in given) or len(tensors) < 2:
            return None
        names = tuple("" if t is None else str(t.node.target) for t in given)
        for name, (_, others) in self.norms.items():
            if others == names:
                return name
        dims, size = input.node.meta["value"].dim(), running_mean.node.meta["value"].numel()
        if isinstance(owner, _BatchNorm):
            momentum = owner.momentum  # type: ignore[assignment]
        return self._add_norm(NORMS[dims](size, eps=eps, momentum=momentum), owner, path, names)

    def _add_norm(
        self, norm: nn.Module, owner: nn.Module, path: str, names: tuple[str, ...]
    ) -> str:
        """Give ``norm`` the tensors of these names, and a place: that of the module to which they
        belong if it is nothing but a BatchNorm, else one in ``owner``."""
        for attribute, name in zip(STATISTICS, names, strict=True):
            tensors = norm._parameters if attribute in norm._parameters else norm._buffers
            tensors[attribute] = get_tensor(self.root, name) if name else None
        prefix = names[0].rpartition(".")[0]
        holder = self.root.get_submodule(prefix)
        usual = [f"{prefix}.{attribute}" for attribute in STATISTICS]
        others = {*holder._parameters, *holder._buffers} - {*STATISTICS, "num_batches_tracked"}
        if all(name in ("", own) for name, own in zip(names, usual, strict=True)) and not others:
            path = prefix
            if (counter := holder._buffers.get("num_batches_tracked")) is not None:
                norm._buffers["num_batches_tracked"] = counter
            norm._modules = holder._modules  # such as its activation
        else:
            path = f"{path}.batch_norm".lstrip(".")
            while path in self.norms:
                path += "_"
        self.norms[path] = norm, names
        return path

    def submodule(self, name: str) -> nn.Module:
        return self.norms[name][0] if name in self.norms else super().submodule(name)
