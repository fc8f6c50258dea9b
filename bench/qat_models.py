"""A float model prepared for quantization-aware training by each library, as its users do it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import divqat
from bench import plain
from bench.case import import_peer
from divqat.nn import FakeQuantize
from divqat.nn._layer import QuantLayer

Prepare = Callable[[nn.Module, Tensor], nn.Module]


def ours(mode: str = "exact") -> Prepare:
    """``divqat.prepare`` with the preset for x86."""
    config = dataclasses.replace(divqat.preset("x86"), mode=mode)
    return lambda model, x: divqat.prepare(model, config, x)


def one_by_one(model: nn.Module, x: Tensor) -> nn.Module:
    """The same without grouped weights: every layer quantizes its own weight."""
    return divqat.quantize.ungroup_weights(divqat.prepare(model, "x86", x))


def pure_pytorch(model: nn.Module, x: Tensor) -> nn.Module:
    """Our placement of fake-quantizers, with the implementations of ``plain.py``."""
    prepared = one_by_one(model, x)
    for name, module in list(prepared.named_modules()):
        if isinstance(module, FakeQuantize):
            observed = plain.Observed(-6.0, 6.0, module.spec.averaging_constant, module.relu)
            prepared.set_submodule(name, observed.to(x.device))
        elif isinstance(module, QuantLayer):
            module.quantize_weight = _plain_weight  # type: ignore[method-assign]
    return prepared


def _plain_weight(weight: Tensor) -> Tensor:
    return plain.weights(weight)[0]


def torch_ao(fused: bool) -> Prepare:
    """FX graph mode with its default settings for x86: fused observers, or the plain ones."""

    def prepare(model: nn.Module, x: Tensor) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao.quantization is being removed from PyTorch
            ao = import_peer("torch.ao.quantization", "torch.ao")
            fx = import_peer("torch.ao.quantization.quantize_fx", "torch.ao")
            # version 1 has fused observers, version 0 has FakeQuantize
            mapping = ao.get_default_qat_qconfig_mapping("x86", version=int(fused))
            return fx.prepare_qat_fx(copy.deepcopy(model).train(), mapping, (x,))

    return prepare


def pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao's export-based quantization, with its quantizer for x86."""
    package = "torchao.quantization.pt2e"
    api: Any = import_peer(f"{package}.quantize_pt2e", "torchao")
    x86: Any = import_peer(f"{package}.quantizer.x86_inductor_quantizer", "torchao")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(copy.deepcopy(model).train(), (x,)).module()
    prepared = api.prepare_qat_pt2e(exported, quantizer)
    import_peer(package, "torchao").move_exported_model_to_train(prepared)
    prepared.train = lambda mode=True: prepared  # type: ignore[method-assign] # an exported model has none
    return prepared


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    """Layerwise swap: int8 inputs with a learned scale, weights per channel."""
    layers: Any = import_peer("brevitas.nn", "brevitas")
    quant: Any = import_peer("brevitas.quant", "brevitas")
    swap: Any = import_peer("brevitas.graph.quantize", "brevitas").layerwise_quantize
    options = {
        "input_quant": quant.Int8ActPerTensorFloat.let(collect_stats_steps=1),
        "weight_quant": quant.Int8WeightPerChannelFloat,
        "return_quant_tensor": False,
    }
    traced = torch.fx.symbolic_trace(copy.deepcopy(model).train())
    swapped = swap(
        traced,
        compute_layer_map={
            nn.Conv2d: (layers.QuantConv2d, options),
            nn.Linear: (layers.QuantLinear, options),
        },
    ).train()
    for _ in range(2):  # the first batch sets the scales, which are parameters from then on
        swapped(x)
    return swapped
