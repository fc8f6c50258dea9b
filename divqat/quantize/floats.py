"""The layers with a weight that stay in float, each with the reason and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from divqat.nn._layer import QuantLayer
from divqat.quantize.config import QuantConfig
from divqat.quantize.operators import lacks_kernel

# Types that multiply by a weight, including their subclasses.
WEIGHTED = (
    *(_ConvNd, nn.Linear, nn.Bilinear),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)


@dataclass(frozen=True)
class FloatLayer:
    """A layer in float.

    Attributes:
        name: of the module, or of the operation in the graph.
        kind: its type.
        reason: why it stays in float.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.reason}"


def float_layers(model: nn.Module) -> list[FloatLayer]:
    """The layers with a weight that ``model`` calls and that are not quantized; of a model without
    a graph, all."""
    if not isinstance(model, fx.GraphModule):
        return _inside("", model)
    calls = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    layers: dict[str, FloatLayer] = {}
    for name in dict.fromkeys(calls):
        layers |= {layer.name: layer for layer in _inside(name, model.get_submodule(name))}
    return list(layers.values())


def without_kernel(model: nn.Module, config: QuantConfig) -> list[FloatLayer]:
    """The quantized layers that the runtime of ``config`` computes in float."""
    return [
        FloatLayer(name, type(module).__name__, reason)
        for name, module in model.named_modules()
        if isinstance(module, QuantLayer) and (reason := lacks_kernel(module, config))
    ]


def _inside(prefix: str, module: nn.Module) -> list[FloatLayer]:
    found = []
    for path, child in module.named_modules(prefix=prefix):
        if isinstance(child, WEIGHTED) and not isinstance(child, QuantLayer):
            found.append(FloatLayer(path, type(child).__name__, _reason(child)))
    return found


def _reason(module: Any) -> str:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "runtimes have no integer kernel for it; replace it, or name it in skip"
    if isinstance(module, nn.Bilinear):
        return "a product of two inputs; write it as matmul and Linear, or name it in skip"
    if isinstance(module, nn.MultiheadAttention):
        return "with bias_k, bias_v or add_zero_attn; leave these out, or name it in skip"
    return (
        "in a part that is not traced; make its forward traceable, use Conv2d, ConvTranspose2d or "
        "Linear, or name it in skip"
    )
