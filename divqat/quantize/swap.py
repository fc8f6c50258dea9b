"""Replace float layers by quantized ones."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from divqat._util.errors import unknown_name
from divqat.nn import QuantConv2d, QuantConvBn2d, QuantConvTranspose2d, QuantLinear, QuantSpec
from divqat.nn._layer import QuantLayer
from divqat.nn.fake_quantize import activation_quantizer
from divqat.nn.function import QuantFunction
from divqat.quantize.config import QuantConfig
from divqat.quantize.tracing.hooks import move_hooks

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def layer_type(module: nn.Module) -> type | None:
    """The type of ``LAYERS`` as which ``module`` computes, which may be a subclass with another
    constructor; None: it is no such layer, or has a forward of its own."""
    for base in LAYERS:
        if isinstance(module, base) and not isinstance(module, QuantLayer):
            own = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
            if own == [getattr(base, name, None) for name in ("forward", "_conv_forward")]:
                return base
    return None


def swap(model: nn.Module, config: QuantConfig, input_spec: QuantSpec | None) -> None:
    """Swap every float layer, and set the bits of the first and the last layer.

    Of a traced model, the layers are those that its graph calls. First and last are meant in the
    order of the graph's calls in eval mode, or of registration without a graph.

    Raises:
        ValueError: there is no layer to swap, or ``config.layer_bits`` names another.
    """
    modules = dict.fromkeys(_called(model, {"eval", "train"}))  # in order
    layers = [
        module
        for name, module in model.named_modules()
        if module in modules
        and (layer_type(module) or isinstance(module, (QuantConvBn2d, QuantFunction)))
        and not config.skips(name)
    ]
    if not layers:
        raise ValueError("model: wanted Conv2d, ConvTranspose2d or Linear layers, got none")
    calls = [module for module in _called(model, {"eval"}) if module in layers] or layers
    first, last = calls[0], calls[-1]
    names: dict[nn.Module, list[str]] = {layer: [] for layer in layers}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(name)
    _check_layer_bits(config, [name for known in names.values() for name in known])
    swapped: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        spec = config.layer(names[layer], edge=layer in (first, last))
        layer_input = config.input() if input_spec and layer is first else input_spec
        if isinstance(layer, QuantLayer):
            layer.set_weight_spec(spec)
            if layer_input:
                layer.input_fake_quantize = activation_quantizer(layer_input)
            continue
        swapped[layer] = _quantized(layer, spec, layer_input)
    # A layer may have several names, and is swapped under each.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in swapped:
            model.set_submodule(name, swapped[module])


def _called(model: nn.Module, modes: set[str]) -> list[nn.Module]:
    """The modules that a graph calls in any of the modes, or all without a graph, in order."""
    if not isinstance(model, fx.GraphModule):
        return list(model.modules())
    nodes = [node for node in model.graph.nodes if node.op == "call_module"]
    return [model.get_submodule(str(n.target)) for n in nodes if modes & n.meta["modes"]]


def _check_layer_bits(config: QuantConfig, names: list[str]) -> None:
    for name in config.layer_bits:
        if name not in names:
            raise ValueError(f"layer_bits: {unknown_name('layer', name, names)}")


def _conv_arguments(conv: nn.Conv2d | nn.ConvTranspose2d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


class Folded(nn.Identity):
    """Stands where a module was that is a part of another one now."""


def can_fold(conv: nn.Module, name: str, bn: Any, config: QuantConfig) -> bool:
    """Whether a BatchNorm that reads a convolution of this name can be a part of it."""
    if layer_type(conv) is not nn.Conv2d or config.skips(name):
        return False
    if not (bn.affine and bn.track_running_stats):
        return False
    if config.weight.learned and not config.weight.per_channel:
        return False  # a single learned scale cannot follow the factors of the channels
    # No hook may see the value between the two, or have to run backward.
    between = conv._forward_hooks or bn._forward_pre_hooks
    backward = [m._backward_hooks or m._backward_pre_hooks for m in (conv, bn)]
    return not between and not any(backward)


def conv_bn(conv: Any, bn: Any, spec: QuantSpec) -> QuantConvBn2d:
    """A convolution and its BatchNorm as one layer with the same parameters."""
    fused = QuantConvBn2d(
        conv.in_channels,
        conv.out_channels,
        **_conv_arguments(conv),
        eps=bn.eps,
        momentum=bn.momentum,
        weight_spec=spec,
        input_spec=None,
    )
    fused.weight, fused.bias, fused.bn = conv.weight, conv.bias, bn
    move_hooks(conv, fused)
    move_hooks(bn, fused, ("_forward_hooks",))
    return fused.to(conv.weight.device)


def _quantized(
    layer: nn.Module, weight_spec: QuantSpec, input_spec: QuantSpec | None
) -> QuantLayer:
    """The quantized counterpart of a float layer, with the same parameters."""
    specs: dict[str, Any] = {"weight_spec": weight_spec, "input_spec": input_spec}
    new: Any
    if isinstance(layer, nn.Linear):
        new = QuantLinear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, **specs
        )
    else:
        assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        arguments = _conv_arguments(layer) | specs
        if isinstance(layer, nn.ConvTranspose2d):
            arguments["output_padding"] = layer.output_padding
            new = QuantConvTranspose2d(layer.in_channels, layer.out_channels, **arguments)
        else:
            new = QuantConv2d(layer.in_channels, layer.out_channels, **arguments)
    new.weight, new.bias = layer.weight, layer.bias
    move_hooks(layer, new)
    return new.to(layer.weight.device)
