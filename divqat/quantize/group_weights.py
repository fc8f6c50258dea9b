"""The weights of many layers quantized together: a call per model instead of one per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from divqat.nn._layer import QuantLayer
from divqat.ops import fake_quantize_weights


def group_weights(model: nn.Module, bucket_mb: float = 25.0) -> nn.Module:
    """Let each forward of ``model`` quantize the weights of many layers at once; returns ``model``.

    One call of :func:`divqat.ops.fake_quantize_weights` per bucket of layers and grid takes the
    place of one per layer; values and gradients are the same, bit for bit. :func:`divqat.prepare`
    does it for models that it can trace.

    A bucket's weights get their gradients together, when the backward has passed the first of its
    layers and before it goes on. Buckets are filled from the last layer towards the first, as
    those of ``DistributedDataParallel`` are, which so sends a bucket's gradients while those of
    the earlier ones are computed. What does not fill a bucket is left to the first layers, whose
    gradients nothing hides.

    A layer with a learned weight scale, one that overrides ``quantize_weight``, one whose weight a
    hook computes when it is called (``torch.nn.utils.prune``), one that is called a second time and
    one that is called without ``model`` quantize for themselves. Nothing is kept
    between two forwards, and no forward finds what one that failed has left.

    * Layers that are added or replaced later are not grouped: call this again, which replaces
      what was there.
    * All weights of a bucket must be there when the first of its layers is called, which FSDP
      does not promise: :func:`ungroup_weights`.
    * A layer must not go from training to eval mode in the middle of a forward.
    * What ``torch.utils.checkpoint`` runs again inside ``model`` quantizes for itself then. With a
      grid that is not symmetric about zero it saves other tensors so, which is an error there.
    * Under ``torch.compile`` a layer that is not called gets a gradient of 0 instead of none.

    Args:
        model: holds layers of :mod:`divqat.nn`; may be a part of the model that is trained.
        bucket_mb: most of a bucket, in 2^20 bytes; a larger weight is a bucket of its own. The
            default is DistributedDataParallel's ``bucket_cap_mb``. Infinity makes one bucket.

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
        # A copy of a GraphModule has lost its forward hooks when these are called with it.
        model._register_deepcopy_hook(groups.regroup)
    return model


def ungroup_weights(model: nn.Module) -> nn.Module:
    """Undo :func:`group_weights` in ``model`` and what is in it; returns ``model``."""
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
    """Neighbouring layers, whose weights are quantized when the first of them is called.

    Not before: autograd runs backward what was called last, so the bucket's backward comes between
    its first layer's and what precedes that one. Called as the forward begins, it would come last
    of all, after the backward of every layer.
    """

    def __init__(self, layers: list[QuantLayer]) -> None:
        self.layers = layers

    def open(self) -> None:
        """Let the first call of any of the layers quantize the weights of all."""
        for layer in self.layers:
            layer._group, layer._handed = self.quantize, None

    def close(self) -> None:
        """Let each layer quantize its weight itself, and keep none."""
        for layer in self.layers:
            layer._group = layer._handed = None

    def quantize(self) -> None:
        """Hand every layer its quantized weight, and close."""
        self.close()
        calls: dict[Any, list[tuple[QuantLayer, Tensor, Tensor | None]]] = {}
        for layer in self.layers:
            # What a pruning hook computes is an attribute, and not there before the layer's call.
            if layer.weight_fake_quantize is not None or "weight" in layer.__dict__:
                continue
            weight, factor = layer.scaled_weight()
            # Gradient or not: with one that needs it, all outputs of a call would seem to.
            differentiable = weight.requires_grad and torch.is_grad_enabled()
            kind = (weight.dtype, str(weight.device), differentiable)
            members = calls.setdefault((layer.weight_grid(), kind), [])
            members.append((layer, weight, factor))
        for (grid, _), members in calls.items():
            quantized = fake_quantize_weights([weight for _, weight, _ in members], *grid)
            for (layer, _, factor), weight in zip(members, quantized, strict=True):
                layer._handed = weight, factor


class WeightGroups:
    """The hooks of one model; in a copy of the model they refer to the copy's layers."""

    def __init__(self, buckets: list[Bucket], bucket_mb: float) -> None:
        self.buckets = buckets
        self.bucket_mb = bucket_mb

    def open(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        for bucket in self.buckets:
            bucket.open()

    def close(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an exception, too: leave nothing to the next forward."""
        for bucket in self.buckets:
            bucket.close()

    def regroup(self, model: nn.Module) -> None:
        """Do for ``model``, a copy, what was done for the original."""
        group_weights(model, self.bucket_mb)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), WeightGroups)


def _in_forward_order(model: nn.Module) -> list[QuantLayer]:
    """The layers to group, as the graph calls them, or as they were registered without one."""
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
    """Neighbours together, at most ``limit`` bytes each, filled from the last; in order."""
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
