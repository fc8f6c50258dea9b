"""Find the quantizer of each layer's input."""

from __future__ import annotations

from torch import fx, nn

from divqat.nn._layer import QuantLayer
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.quantize import patterns


def link_inputs(model: nn.Module) -> None:
    """Set the quantizer of its input for each layer of a traced model, or of its traced parts.

    Layers that are called more than once have none: an integer bias depends on the scale of the
    input, and each call may have another one.
    """
    for layer, sources in called_with(model).items():
        quantizers = (source for source in sources if source is not None)
        layer._source = tuple(quantizers) if len(sources) == 1 else ()


def called_with(
    model: nn.Module,
) -> dict[QuantLayer, list[FakeQuantize | LearnedStepFakeQuantize | None]]:
    """The quantizer of the input of each call of each layer, in traced parts of a model; None: the
    input of this call has none."""
    sources: dict[QuantLayer, list[FakeQuantize | LearnedStepFakeQuantize | None]] = {}
    for traced in model.modules():
        if not isinstance(traced, fx.GraphModule):
            continue
        for node in traced.graph.nodes:
            if node.op != "call_module":
                continue
            layer = traced.get_submodule(str(node.target))
            if not isinstance(layer, QuantLayer):
                continue
            source = patterns.producer(traced, node.all_input_nodes[0])
            quantizer = None
            if source.op == "call_module":
                quantizer = traced.get_submodule(str(source.target))
            known = isinstance(quantizer, (FakeQuantize, LearnedStepFakeQuantize))
            sources.setdefault(layer, []).append(quantizer if known else None)  # type: ignore[arg-type]
    return sources
