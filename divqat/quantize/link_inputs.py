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
    sources: dict[QuantLayer, tuple[FakeQuantize | LearnedStepFakeQuantize, ...]] = {}
    for traced in model.modules():
        if not isinstance(traced, fx.GraphModule):
            continue
        for node in traced.graph.nodes:
            if node.op != "call_module":
                continue
            layer = traced.get_submodule(str(node.target))
            if not isinstance(layer, QuantLayer):
                continue
            called_before = layer in sources
            sources[layer] = ()
            source = patterns.producer(traced, node.all_input_nodes[0])
            if source.op == "call_module" and not called_before:
                quantizer = traced.get_submodule(str(source.target))
                if isinstance(quantizer, (FakeQuantize, LearnedStepFakeQuantize)):
                    sources[layer] = (quantizer,)
    for layer, quantizers in sources.items():
        layer._source = quantizers
