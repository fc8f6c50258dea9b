"""Switch single quantizers of a prepared model off, and restore all of its state afterwards."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from divqat._util.modes import modes_kept
from divqat.nn._layer import QuantLayer
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.nn.spec import QuantSpec
from divqat.quantize.checks import check_is_prepared
from divqat.quantize.link_inputs import called_with

Quantizer = FakeQuantize | LearnedStepFakeQuantize
Grid = tuple[QuantSpec, LearnedStepFakeQuantize | None]  # of a weight, and its quantizer if learned


@dataclass(frozen=True, eq=False)
class Unit:
    """What is quantized, or stays in float, together.

    Attributes:
        name: of the layer, or of the quantizer.
        layer: its weight and bias; None for a quantizer that no layer reads.
        quantizers: those that the layer reads, of all its calls; a quantizer that several layers
            read is in the unit of each.
    """

    name: str
    layer: QuantLayer | None
    quantizers: tuple[Quantizer, ...]


class Switches:
    """The switches of a prepared model, to be used inside :func:`unchanged`.

    Raises:
        ValueError: the model is not prepared, or a quantizer has not seen a batch.
    """

    def __init__(self, model: nn.Module) -> None:
        check_is_prepared("model", model)
        self.units = _units(model)
        self.layers = [unit.layer for unit in self.units if unit.layer is not None]
        quantizers = [quantizer for unit in self.units for quantizer in unit.quantizers]
        self.quantizers = list(dict.fromkeys(quantizers))
        self._enabled = {q for q in self.quantizers if q.fake_quant_enabled}
        self._own = {
            layer: (layer.weight_spec, layer.weight_fake_quantize) for layer in self.layers
        }
        self._grids: dict[tuple[QuantLayer, int], Grid] = {}

    def bits(self) -> dict[QuantLayer, int]:
        """The width of every layer's weight as prepared."""
        return {layer: spec.bits for layer, (spec, _) in self._own.items()}

    def apply(self, weights: Mapping[QuantLayer, int], quantizers: Collection[Quantizer]) -> None:
        """Quantize these weights with these widths, and these activations; the rest is float.

        A quantizer that was disabled before stays so.
        """
        for layer in self.layers:
            bits = weights.get(layer)
            layer.weight_quant_enabled = bits is not None
            if bits is not None:
                layer.weight_spec, layer.weight_fake_quantize = self._grid(layer, bits)
        for quantizer in self.quantizers:
            quantizer.fake_quant_enabled = quantizer in quantizers and quantizer in self._enabled

    def _grid(self, layer: QuantLayer, bits: int) -> Grid:
        """The layer's grid with ``bits``. A learned scale keeps its range: the scale times the
        largest code is the same."""
        if (layer, bits) not in self._grids:
            spec, learned = self._own[layer]
            if bits != spec.bits:
                top, spec = spec.quant_max, replace(spec, bits=bits)
                if learned is not None:
                    learned = copy.deepcopy(learned)
                    learned.spec = spec
                    with torch.no_grad():
                        learned.scale.mul_(top / spec.quant_max)
            self._grids[layer, bits] = spec, learned
        return self._grids[layer, bits]


def _units(model: nn.Module) -> list[Unit]:
    """The units of a model: its layers in order of registration, then quantizers that none reads.

    Raises:
        ValueError: a quantizer has not seen a batch.
    """
    sources = called_with(model)
    found, taken = [], set[nn.Module | None]()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            read = [layer.input_fake_quantize, *sources.get(layer, ())]
            quantizers = tuple(dict.fromkeys(q for q in read if q is not None))
            found.append(Unit(name, layer, quantizers))
            taken |= {*quantizers, layer.weight_fake_quantize}
    for name, module in model.named_modules():
        if not isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)):
            continue
        if not module.has_range():
            raise ValueError(
                "model: wanted one whose quantizers have all seen a batch in training mode, got "
                f"{name}, which has not"
            )
        if module not in taken:
            found.append(Unit(name, None, (module,)))
    return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A block in eval mode and without gradients, after which modes, buffers, the state of the
    quantized modules, and torch's random numbers are as before, bit for bit.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    kinds = (QuantLayer, FakeQuantize, LearnedStepFakeQuantize)
    quantized = [
        (module, dict(vars(module)), dict(module._modules))
        for module in modules
        if isinstance(module, kinds)
    ]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if isinstance(buffer, Tensor)
    ]
    gpus = sorted({b.device.index or 0 for *_, b in buffers if b.device.type == "cuda"})
    with modes_kept(model), torch.random.fork_rng(gpus), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for changed, attributes, children in quantized:
                vars(changed).clear()
                vars(changed).update(attributes)
                changed._modules.clear()
                changed._modules.update(children)
            for owner, name, buffer, value in buffers:
                owner._buffers[name] = buffer.copy_(value)
