"""Replace float layers by quantized ones."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from divqat._util.errors import unknown_name
from divqat.nn import QuantConv2d, QuantConvBn2d, QuantConvTranspose2d, QuantLinear, QuantSpec
from divqat.nn._layer import QuantLayer
from divqat.quantize.config import QuantConfig

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

# Types that multiply by a weight, including their subclasses.
WEIGHTED = (
    *(_ConvNd, nn.Linear, nn.Bilinear),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)


def swap(model: nn.Module, config: QuantConfig, input_spec: QuantSpec | None) -> None:
    """Swap every float layer, and set the bits of the first and the last layer.

    First and last are meant in the order of the graph's calls, or of registration without a graph.
    A warning names the layers with a weight that stay in float although ``config.skip`` does not
    name them.

    Raises:
        ValueError: there is no layer to swap, or ``config.layer_bits`` names another.
    """
    layers = {  # in order
        module: None
        for name, module in model.named_modules()
        if (type(module) in LAYERS or isinstance(module, QuantConvBn2d)) and not config.skips(name)
    }
    if not layers:
        raise ValueError("model: wanted Conv2d, ConvTranspose2d or Linear layers, got none")
    calls = list(layers)
    if isinstance(model, fx.GraphModule):
        nodes = (node for node in model.graph.nodes if node.op == "call_module")
        modules = (model.get_submodule(str(node.target)) for node in nodes)
        calls = [module for module in modules if module in layers] or calls
    first, last = calls[0], calls[-1]
    names: dict[nn.Module, list[str]] = {layer: [] for layer in layers}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(name)
    _check_layer_bits(config, [name for known in names.values() for name in known])
    swapped: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        spec = config.layer(names[layer], edge=layer in (first, last))
        if isinstance(layer, QuantConvBn2d):
            layer.set_weight_spec(spec)
            continue
        layer_input = config.input() if input_spec and layer is first else input_spec
        swapped[layer] = _quantized(layer, spec, layer_input)
    # A layer may have several names, and is swapped under each.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in swapped:
            model.set_submodule(name, swapped[module])
    floats = [f"{name} ({kind})" for name, kind in float_layers(model) if not config.skips(name)]
    if floats:
        # stacklevel: the caller of prepare
        warnings.warn(f"layers of these types stay in float: {', '.join(floats)}", stacklevel=3)


def _check_layer_bits(config: QuantConfig, names: list[str]) -> None:
    for name in config.layer_bits:
        if name not in names:
            raise ValueError(f"layer_bits: {unknown_name('layer', name, names)}")


def float_layers(model: nn.Module) -> list[tuple[str, str]]:
    """The names and types of the layers with a weight that are not quantized."""
    return [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, WEIGHTED) and not isinstance(module, QuantLayer)
    ]


def _conv_arguments(conv: nn.Conv2d | nn.ConvTranspose2d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


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
    return new.to(layer.weight.device)
