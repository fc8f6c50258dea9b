"""Quantize the weights of many layers together: one call per bucket instead of one per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from divqat.nn._layer import QuantLayer
from divqat.ops import fake_quantize_weights


def group_weights(model: nn.Module, bucket_mb: float = 25.0) -> nn.Module:
    """Let each forward of ``model`` quantize the weights of many layers at once; returns ``model``.

    One call of :func:`divqat.ops.fake_quantize_weights` per bucket of layers and grid replaces one
    call per layer; values and gradients are the same, bit for bit. :func:`divqat.prepare` does this
    for models that it can trace.

    The weights of a bucket get their gradients together, when the backward has passed the first
    layer of the bucket. Buckets are filled from the last layer to the first, like those of
    ``DistributedDataParallel``, which can therefore send the gradients of a bucket while those of
    earlier buckets are computed. The incomplete bucket is that of the first layers, whose
    communication cannot overlap with computation anyway.

    Some layers still quantize their own weight: those with a learned weight scale, those that
    override ``quantize_weight``, those whose weight a hook computes when they are called
    (``torch.nn.utils.prune``), those that are called a second time, and those that are called
    outside of ``model``. No state is kept between two forwards, even if one of them fails.

    * Layers that are added or replaced later are not grouped: call this function again, which
      replaces the groups.
    * All weights of a bucket must be present when the first of its layers is called. FSDP does not
      guarantee that: use :func:`ungroup_weights`.
    * A layer must not change from training to eval mode in the middle of a forward.
    * Layers that ``torch.utils.checkpoint`` recomputes inside ``model`` quantize their own weights
      in the recomputation. With a grid that is not symmetric about zero they then save other
      tensors, which checkpoint reports as an error.
    * Under ``torch.compile`` a layer that is not called gets a gradient of 0 instead of None.

    Args:
        model: contains layers of :mod:`divqat.nn`; may be a part of the trained model.
        bucket_mb: maximum size of a bucket, in 2^20 bytes; a larger weight has a separate bucket.
            The default is DistributedDataParallel's ``bucket_cap_mb``. Infinity makes one bucket.

    Raises:
        ValueError: ``bucket_mb`` is not positive.
    """
    if not bucket_mb > 0:
        raise ValueError(f"bucket_mb: wanted more than 0, got {bucket_mb}")
    ungroup_weights(model)
    groups = WeightGroups(_buckets(_in_forward_order(model), bucket_mb * 2**20), bucket_mb)
    model.register_forward_pre_hook(groups.open)
    model.register_forward_hook(groups.close, always_call=True)
    if isinstance(model, fx.GraphModule):
        # Deep copies of a GraphModule lose its forward hooks, but call these hooks.
        model._register_deepcopy_hook(groups.regroup)
    return model


def ungroup_weights(model: nn.Module) -> nn.Module:
    """Undo :func:`group_weights` in ``model`` and its submodules; returns ``model``."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if isinstance(module, fx.GraphModule):
            module._deepcopy_hooks = [h for h in module._deepcopy_hooks if not _is_ours(h)]
    return model


def grouped_by(model: nn.Module) -> float | None:
    """The ``bucket_mb`` that :func:`group_weights` was called with; None if it was not."""
    groups = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((group.bucket_mb for group in groups if isinstance(group, WeightGroups)), None)


class Bucket:
    """Neighboring layers whose weights are quantized when the first of them is called.

    The time of the call matters: autograd runs operations backward in reverse order, so the
    bucket's backward follows that of its first layer. If the weights were quantized at the start of
    the forward, it would follow the backward of all layers.
    """

    def __init__(self, layers: list[QuantLayer]) -> None:
        self.layers = layers

    def open(self) -> None:
        """Let the first call of any layer quantize the weights of all, with gradients as now: the
        first layer alone may be called without."""
        self.differentiable = torch.is_grad_enabled()
        for layer in self.layers:
            layer._group, layer._grouped_weight = self.quantize, None

    def close(self) -> None:
        """Let each layer quantize its own weight, and drop stored weights."""
        for layer in self.layers:
            layer._group = layer._grouped_weight = None

    def quantize(self) -> None:
        """Store its quantized weight in every layer, and close."""
        self.close()
        with torch.set_grad_enabled(self.differentiable):
            self._quantize()

    def _quantize(self) -> None:
        calls: dict[Any, list[tuple[QuantLayer, Tensor, Tensor | None]]] = {}
        for layer in self.layers:
            if not layer.weight_quant_enabled:
                continue
            # A pruning hook computes the weight as an attribute when the layer is called.
            if layer.weight_fake_quantize is not None or "weight" in layer.__dict__:
                continue
            weight, factor = layer.scaled_weight()
            # Frozen weights apart: one trained weight makes all outputs of a call need gradients.
            differentiable = weight.requires_grad and torch.is_grad_enabled()
            key = (weight.dtype, str(weight.device), differentiable)
            members = calls.setdefault((layer.weight_grid(), key), [])
            members.append((layer, weight, factor))
        for (grid, _), members in calls.items():
            quantized = fake_quantize_weights([weight for _, weight, _ in members], *grid)
            for (layer, _, factor), weight in zip(members, quantized, strict=True):
                layer._grouped_weight = weight, factor


class WeightGroups:
    """The hooks of one model; those of a copy refer to the copy's layers."""

    def __init__(self, buckets: list[Bucket], bucket_mb: float) -> None:
        self.buckets = buckets
        self.bucket_mb = bucket_mb

    def open(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        for bucket in self.buckets:
            bucket.open()

    def close(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also called after an exception: leave no state to the next forward."""
        for bucket in self.buckets:
            bucket.close()

    def regroup(self, model: nn.Module) -> None:
        """Group the weights of ``model``, a copy, like those of the original."""
        group_weights(model, self.bucket_mb)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), WeightGroups)


def _in_forward_order(model: nn.Module) -> list[QuantLayer]:
    """The layers to group, in the order of the graph's calls, or of registration without one."""
    modules = list(model.modules())
    if isinstance(model, fx.GraphModule):
        calls = [node.target for node in model.graph.nodes if node.op == "call_module"]
        modules = [model.get_submodule(str(name)) for name in calls] + modules
    return [
        module
        for module in dict.fromkeys(modules)
        if isinstance(module, QuantLayer)
        and getattr(module.quantize_weight, "__func__", None) is QuantLayer.quantize_weight
    ]


def _buckets(layers: list[QuantLayer], limit: float) -> list[Bucket]:
    """Buckets of neighboring layers of at most ``limit`` bytes, in order, filled from the last."""
    buckets: list[list[QuantLayer]] = []
    room = 0.0
    for layer in reversed(layers):
        size = layer.weight.numel() * layer.weight.element_size()
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append(layer)
        room -= size
    return [Bucket(layers[::-1]) for layers in reversed(buckets)]
