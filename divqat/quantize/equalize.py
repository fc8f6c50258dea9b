"""Cross-layer equalization: give the channels between two layers weights of similar size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from divqat.nn._layer import QuantLayer
from divqat.nn.conv_bn import QuantConvBn2d
from divqat.nn.fake_quantize import FakeQuantize
from divqat.quantize import patterns
from divqat.quantize.swap import Folded

SWEEPS = 20
FLATTEN: set[Any] = {nn.Flatten, torch.flatten, "flatten"}
# Operations with f(s·x) = s·f(x) for s > 0 in each channel.
HOMOGENEOUS = patterns.RELUS | {
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity),
    *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, Folded),
    *(FakeQuantize, *FLATTEN),
}


@torch.no_grad()
def equalize(model: nn.Module) -> None:
    """Scale the channels between each two neighboring layers so that both have weights of the same
    largest magnitude there (Nagel et al. 2019, arXiv 1906.04721, §4.1, equations 7 to 11).

    The channel's outgoing weights are multiplied by s = sqrt(r₁ r₂) / r₂ and its incoming weights
    and bias are divided by it; r₁ and r₂ are the largest magnitudes, of BatchNorm-folded weights.
    The float function stays the same, as only operations with f(s·x) = s·f(x) may lie between: not
    ReLU6. Only layers that are called once and whose output nothing else reads are scaled.

    Args:
        model: a traced, prepared model in eval mode.

    Raises:
        ValueError: the model was not traced.
    """
    if not isinstance(model, fx.GraphModule):
        raise ValueError("equalize: wanted a model that was traced, got one of swapped layers")
    pairs = neighbors(model)
    for _ in range(SWEEPS):
        for first, second in pairs:
            _equalize(first, second)


def neighbors(model: fx.GraphModule) -> list[tuple[QuantLayer, QuantLayer]]:
    """Each layer with the one that alone reads its output, in order of their calls."""
    calls = [node.target for node in model.graph.nodes if node.op == "call_module"]

    def layer(node: fx.Node) -> QuantLayer | None:
        if node.op != "call_module" or calls.count(node.target) > 1:
            return None
        module = model.get_submodule(str(node.target))
        weighted = isinstance(module, (nn.Conv2d, nn.Linear))
        return module if isinstance(module, QuantLayer) and weighted else None

    pairs = []
    for node in model.graph.nodes:
        first, flat = layer(node), False
        while first is not None and len(node.users) == 1:
            node = next(iter(node.users))
            second, op = layer(node), patterns.operation(model, node)
            flat |= op in FLATTEN
            if second is not None and _matches(first, second, flat):
                pairs.append((first, second))
            if op not in HOMOGENEOUS:
                break
    return pairs


def _matches(first: QuantLayer, second: QuantLayer, flat: bool) -> bool:
    """Whether the second layer's inputs are the first one's channels: several pixels of each if a
    convolution's output was flattened."""
    channels = first.weight.shape[0]
    if isinstance(first, nn.Conv2d) and isinstance(second, nn.Linear):
        return flat and bool(second.weight.shape[1] % channels == 0)
    both = isinstance(first, nn.Conv2d) == isinstance(second, nn.Conv2d)
    return both and not flat


def _equalize(first: QuantLayer, second: QuantLayer) -> None:
    channels = first.weight.shape[0]
    r1 = first.folded()[0].flatten(1).abs().amax(1)
    # [groups, C_out / groups, C_in / groups, pixels]
    groups = getattr(second, "groups", 1)
    shape = groups, second.weight.shape[0] // groups, channels // groups, -1
    r2 = second.folded()[0].reshape(shape).abs().amax((1, 3)).flatten()
    scale = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    _divide(first, scale)
    weight = second.weight.reshape(shape) * scale.view(groups, 1, -1, 1)
    second.weight.copy_(weight.reshape(second.weight.shape))


def _divide(layer: QuantLayer, scale: Tensor) -> None:
    """Divide the layer's output channels by ``scale`` [C]."""
    if isinstance(layer, QuantConvBn2d):  # γ and β, as BatchNorm would undo a change of the weight
        layer.bn.weight.div_(scale)
        layer.bn.bias.div_(scale)
        return
    layer.weight.div_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.div_(scale)
