"""The logits of a prepared model before they are rectified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, fx, nn

from divqat.nn.output import RectifiedOutput
from divqat.quantize import patterns


def output_quantizer(model: nn.Module) -> RectifiedOutput | None:
    """The quantizer of a model's output; None: it stays in float."""
    return next((m for m in model.modules() if isinstance(m, RectifiedOutput)), None)


@contextmanager
def unrectified(model: nn.Module) -> Iterator[None]:
    """A block in which a model returns its logits in float, negative ones included."""
    quantizer = output_quantizer(model)
    if quantizer is None:
        yield
        return
    before = quantizer.relu, quantizer.fake_quant_enabled
    quantizer.relu = quantizer.fake_quant_enabled = False
    try:
        yield
    finally:
        quantizer.relu, quantizer.fake_quant_enabled = before


def output_bias(model: nn.Module) -> Tensor | None:
    """The bias of the layer that computes a model's logits; None: it cannot be found."""
    if not isinstance(model, fx.GraphModule):
        return None
    last = model.graph.output_node().args[0]
    if isinstance(last, fx.Node) and patterns.operation(model, last) is RectifiedOutput:
        last = last.all_input_nodes[0]
    if not isinstance(last, fx.Node):
        return None
    node = patterns.producer(model, last)
    layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(layer, nn.Linear | nn.Conv2d) and not hasattr(layer, "bn"):
        return layer.bias
    return None
