"""From a trained fake-quantized model to the one that is deployed."""

from __future__ import annotations

import warnings

from torch import nn

from divqat.nn._layer import QuantLayer
from divqat.nn.conv_bn import QuantConvBn2d
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.quantize.checks import check_is_prepared, check_parameters, copied
from divqat.quantize.deployed import IntegerLayer, QuantizeDequantize
from divqat.quantize.group_weights import ungroup_weights
from divqat.quantize.link_inputs import link_inputs
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
    activations are symmetric int8, as TensorRT wants it). It computes what the prepared model
    computes in eval mode, and ``torch.onnx.export`` turns it into Q/DQ nodes.

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
    link_inputs(model)  # again: something may have been replaced since
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLayer):
            model.set_submodule(name, IntegerLayer(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)):
            model.set_submodule(name, QuantizeDequantize(module))
    return model.eval()
