"""From a trained fake-quantized model to the one that is deployed."""

from __future__ import annotations

import warnings

from torch import Tensor, fx, nn

from divqat.nn._layer import QuantLayer
from divqat.nn.conv_bn import QuantConvBn2d
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.quantize import patterns
from divqat.quantize.checks import check_is_prepared, check_parameters, copied
from divqat.quantize.deployed import IntegerLayer, QuantizeDequantize
from divqat.quantize.group_weights import ungroup_weights
from divqat.quantize.traced import PreparedModule


def freeze_observers(model: nn.Module) -> nn.Module:
    """Keep all activation ranges as they are from now on; returns ``model``."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.disable_observer()
    return model


def freeze_batchnorm(model: nn.Module) -> nn.Module:
    """Use and keep the running statistics of every fused BatchNorm in training; returns
    ``model``."""
    for module in model.modules():
        if isinstance(module, QuantConvBn2d):
            module.freeze()
    return model


def convert(prepared: nn.Module) -> nn.Module:
    """A copy of a prepared model with integer weights and fixed scales, in eval mode.

    BatchNorm is folded, weights become int8 codes, biases int32 on the accumulator's scale (the
    bias of a layer that the model calls more than once stays in float, and all of them where
    activations are symmetric int8, as TensorRT wants it). It computes what the
    prepared model computes in eval mode up to the rounding of the biases, and
    ``torch.onnx.export`` turns it into Q/DQ nodes.

    Raises:
        ValueError: ``prepared`` holds no quantized layer, a quantizer has not seen a batch, or a
            layer is pruned or weight-normed.
    """
    check_is_prepared("prepared", prepared)
    layers = [(name, m) for name, m in prepared.named_modules() if isinstance(m, QuantLayer)]
    norms = [(f"{name}.bn", m.bn) for name, m in layers if isinstance(m, QuantConvBn2d)]
    check_parameters("prepared", [*layers, *norms])
    for module in prepared.modules():
        if isinstance(module, PreparedModule) and (late := module.new_float_layers()):
            warnings.warn(
                f"layers that came after prepare stay in float: {', '.join(late)}", stacklevel=2
            )
    for name, module in prepared.named_modules():
        if isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)) and not module.has_range():
            raise ValueError(f"prepared: {name} has not seen a batch in training mode")
    # What a runtime computes is float32, whatever the training was cast to.
    model = ungroup_weights(copied("prepared", prepared).requires_grad_(False).float())
    scales = _input_scales(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLayer):
            own = module.input_fake_quantize
            scale = scales.get(name) if own is None else _bias_scale(own)
            model.set_submodule(name, IntegerLayer(module, scale))
    for name, module in list(model.named_modules()):
        if isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)):
            model.set_submodule(name, QuantizeDequantize(module))
    return model.eval()


def _input_scales(model: nn.Module) -> dict[str, Tensor | None]:
    """The scale of the activation that each layer of a traced model (or part) reads, for its bias.

    None for a layer that is called more than once: an integer bias lies on the scale of what a call
    reads, and each call may read another one.
    """
    scales: dict[str, Tensor | None] = {}
    for name, traced in model.named_modules():
        if not isinstance(traced, fx.GraphModule):
            continue
        for node in traced.graph.nodes:
            if node.op != "call_module":
                continue
            if not isinstance(traced.get_submodule(str(node.target)), QuantLayer):
                continue
            layer = f"{name}.{node.target}" if name else str(node.target)
            called_before = layer in scales
            scales[layer] = None
            source = patterns.producer(traced, node.all_input_nodes[0])
            if source.op == "call_module" and not called_before:
                quantizer = traced.get_submodule(str(source.target))
                if isinstance(quantizer, (FakeQuantize, LearnedStepFakeQuantize)):
                    scales[layer] = _bias_scale(quantizer)
    return scales


def _bias_scale(quantizer: FakeQuantize | LearnedStepFakeQuantize) -> Tensor | None:
    """What makes integers of a bias, together with the weight's scale: that of the activation.

    None for symmetric int8, which is TensorRT's: it takes no int32 through DequantizeLinear."""
    if quantizer.spec.signed and quantizer.spec.symmetric:
        return None
    return quantizer.calculate_qparams()[0]
