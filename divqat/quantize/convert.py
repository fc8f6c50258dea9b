"""From a trained fake-quantized model to the deployed one."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from divqat.nn._layer import QuantLayer
from divqat.nn.conv_bn import QuantConvBn2d
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.nn.function import QuantFunction
from divqat.quantize.checks import check_is_prepared, check_parameters, deep_copy
from divqat.quantize.deployed import IntegerLayer, QuantizeDequantize
from divqat.quantize.functional import fix_weights
from divqat.quantize.group_weights import ungroup_weights
from divqat.quantize.link_inputs import link_inputs
from divqat.quantize.requantize import requantize
from divqat.quantize.swap import Folded
from divqat.quantize.tracing.traced import PreparedModule


def freeze_observers(model: nn.Module) -> nn.Module:
    """Freeze all activation ranges; returns ``model``."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.disable_observer()
    return model


def freeze_batchnorm(model: nn.Module) -> nn.Module:
    """Let every BatchNorm of a prepared model, fused or not, use its running statistics in
    training, without updating them; returns ``model``. A float model does not change.

    Subclasses of one's own may compute something else as well. In a graph they are taken apart; in
    a model whose layers are swapped they go on, and a warning names them.
    """
    fused = {module.bn for module in model.modules() if isinstance(module, QuantConvBn2d)}
    prepared = any(isinstance(module, QuantLayer) for module in model.modules())
    going_on = []
    for name, module in model.named_modules():
        if isinstance(module, QuantConvBn2d):
            module.freeze()
        elif prepared and module not in fused and isinstance(module, _BatchNorm):
            if kind := _frozen_type(module):
                module.__class__ = kind
                module.eval()  # one without statistics goes on with those of its batches
            else:
                going_on.append(f"{name} ({type(module).__name__})")
    if going_on:
        warnings.warn(
            f"BatchNorm of types of your own does not freeze: {', '.join(going_on)}; call their "
            "eval() after each train()",
            stacklevel=2,
        )
    return model


def _frozen_type(module: _BatchNorm) -> type | None:
    """The frozen form of a BatchNorm of torch, or of one that is synchronized; else None."""
    if type(module).__module__.partition(".")[0] not in ("torch", "divqat"):
        return None  # it may compute something else
    return next((frozen for base, frozen in FROZEN.items() if isinstance(module, base)), None)


class _Frozen(nn.Module):
    """Stays in eval mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with constant statistics."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with constant statistics."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with constant statistics."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` with constant statistics."""


FROZEN: dict[type, type] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def convert(prepared: nn.Module) -> nn.Module:
    """A copy of a prepared model with integer weights and fixed scales, in eval mode.

    BatchNorm is folded, weights become int8 codes, and biases become int32 on the accumulator's
    scale. Biases stay in float in layers that the model calls more than once, and in all layers if
    activations are symmetric int8, as TensorRT needs it. The copy computes the same as the prepared
    model in eval mode, and ``torch.onnx.export`` turns it into Q/DQ nodes.

    Raises:
        ValueError: ``prepared`` has no quantized layer, a quantizer has not seen a batch, or a
            layer is pruned or weight-normed.
    """
    check_is_prepared("prepared", prepared)
    layers = [
        (name, m)
        for name, m in prepared.named_modules()
        if isinstance(m, QuantLayer) and not isinstance(m, QuantFunction)
    ]
    norms = [(f"{name}.bn", m.bn) for name, m in layers if isinstance(m, QuantConvBn2d)]
    check_parameters("prepared", [*layers, *norms])
    for module in prepared.modules():
        if isinstance(module, PreparedModule) and (late := module.new_float_layers()):
            warnings.warn(
                "layers added after prepare stay in float:\n" + "\n".join(map(str, late)),
                stacklevel=2,
            )
    # Runtimes compute in float32, even if training was cast to another dtype.
    model = ungroup_weights(deep_copy("prepared", prepared).requires_grad_(False).float())
    for module in model.modules():
        if isinstance(module, PreparedModule):  # what only training mode does is not deployed
            module.set_graphs(module.graph, module.graph)
            module.delete_all_unused_submodules()
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)) and not module.has_range():
            raise ValueError(f"prepared: {name} has not seen a batch in training mode")
    for module in model.modules():
        if isinstance(module, PreparedModule):
            fix_weights(module)
    link_inputs(model)  # again: modules may have been replaced since prepare
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLayer):
            model.set_submodule(name, IntegerLayer(module))
        elif isinstance(module, Folded):
            model.set_submodule(name, nn.Identity())
    for name, module in list(model.named_modules()):
        if isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)):
            model.set_submodule(name, QuantizeDequantize(module))
    for module in model.modules():
        if isinstance(module, PreparedModule):
            requantize(module)
    return model.eval()
