"""What each layer's quantization costs, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from divqat._util.text import columns
from divqat.nn._layer import QuantLayer
from divqat.quantize.bypass import Quantizer, Switches, Unit, unchanged
from divqat.quantize.scores import Score, measure

WHAT = ("both", "weights", "activations")


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer, or a quantizer of activations that no layer reads.

    Attributes:
        name: the module's name.
        parameters: number of elements of the layer's weight; 0 without a layer.
        bits: width of the weight; None if it is not studied.
        activation_bits: widths of the studied activations that the layer reads.
        alone: only this layer is quantized.
        others: all but this layer are quantized.
        at: by width, only this layer is quantized, and its weight has this width.
    """

    name: str
    parameters: int
    bits: int | None
    activation_bits: tuple[int, ...]
    alone: Score
    others: Score
    at: dict[int, Score]

    def widths(self) -> str:
        """The widths in words: ``w7 a8`` for a weight of 7 bits and an input of 8."""
        weight = [] if self.bits is None else [f"w{self.bits}"]
        return " ".join([*weight, *(f"a{bits}" for bits in self.activation_bits)])


@dataclass(frozen=True)
class Sensitivity:
    """The result of :func:`sensitivity`; ``str()`` is a table.

    Attributes:
        what: what was quantized: ``"both"``, ``"weights"`` or ``"activations"``.
        images: number of images.
        floating: nothing is quantized; the reference of agreement, divergence and SQNR.
        quantized: everything is.
        layers: in the order of ``named_modules()``.
    """

    what: str
    images: int
    floating: Score
    quantized: Score
    layers: tuple[LayerSensitivity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("loss", "accuracy", "agree", "SQNR dB")
        absent = ("-",) * len(head)
        alone, others = (f"alone: {head[0]}", *head[1:]), (f"others: {head[0]}", *head[1:])
        lines: list[tuple[str, ...]] = [("layer", "bits", *alone, *others)]
        lines.append(("(all float)", "-", *self.floating.cells(), *absent))
        for layer in self.layers:
            cells = (*layer.alone.cells(), *layer.others.cells())
            lines.append((layer.name, layer.widths(), *cells))
        lines.append(("(all quantized)", "-", *self.quantized.cells(), *absent))
        text = columns(lines)
        widths = sorted({bits for layer in self.layers for bits in layer.at})
        if widths:
            text += f"\n\n{self.measure}, only this layer quantized, its weight with\n"
            text += columns(self._by_width(widths))
        return text

    @property
    def measure(self) -> str:
        """``"loss"``, or without labels ``"divergence"``."""
        return "divergence" if self.floating.loss is None else "loss"

    def _by_width(self, widths: list[int]) -> list[list[str]]:
        lines = [["layer", *(f"{bits} bits" for bits in widths)]]
        for layer in self.layers:
            if layer.at:
                values = (getattr(layer.at[bits], self.measure) for bits in widths)
                lines.append([layer.name, *(f"{value:.4f}" for value in values)])
        return lines


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    what: str = "both",
    bits: Iterable[int] = (),
) -> Sensitivity:
    """Loss and answers with one layer quantized and all others float, and the other way round.

    A layer's quantization is that of its weight, its bias (if an integer kernel would round it) and
    its input. A quantizer that several layers read counts for each of them: with one of them float,
    it is off for all. Quantizers that only other operations read (additions, pooling, the output)
    are listed after the layers. With nothing quantized the answers are those of the float model in
    eval mode; the rectification of ``rectify_output`` stays, as it is no quantization.

    The batches are read once; each is answered 2 n + 2 times for n layers, and once more for each
    layer and width in ``bits``. Modes, ranges, buffers and random numbers are restored bit for bit,
    also after an error.

    Args:
        model: made by :func:`divqat.prepare` and calibrated; returns logits [N, num_classes].
        batches: (images, labels) with float images [N, …] and labels int64 [N], which go to the
            model's device; or images without labels, for all batches.
        what: ``"both"``, or only ``"weights"`` or ``"activations"``; the rest is float in all
            settings.
        bits: widths, 2 to 8, at which each weight is also tried, with an observed scale of that
            width; a learned scale keeps its range. Nothing is trained.

    Raises:
        TypeError: ``batches`` or the model's output is of another type.
        ValueError: an unknown ``what``; ``bits`` outside 2 to 8 or without weights; the model is
            not prepared or not calibrated; batches, labels or logits have wrong shapes.
        FloatingPointError: a logit is NaN or Inf.
    """
    if what not in WHAT:
        raise ValueError(f"what: wanted one of {', '.join(WHAT)}, got {what!r}")
    widths = check_widths("bits", bits)
    if widths and what == "activations":
        raise ValueError(f"bits: wanted none with what = 'activations', got {widths}")
    with unchanged(model):
        switches = Switches(model)
        own = switches.bits() if what != "activations" else {}
        activations = set() if what == "weights" else set(switches.quantizers)
        units = [unit for unit in switches.units if unit.layer in own or _read(unit, activations)]
        runs: list[tuple[Mapping[QuantLayer, int], Set[Quantizer]]] = [
            ({}, set()),
            (own, activations),
        ]
        for unit in units:
            read = _read(unit, activations)
            weight = {layer: n for layer, n in own.items() if layer is unit.layer}
            rest = {layer: n for layer, n in own.items() if layer is not unit.layer}
            runs += [(weight, read), (rest, activations - read)]
            runs += [({layer: n}, read) for layer in weight for n in widths]
        settings = [partial(switches.apply, *run) for run in runs]
        (floating, quantized, *scores), images = measure(model, batches, settings)
        layers, remaining = [], iter(scores)
        for unit in units:
            studied = unit.layer in own
            assert unit.layer is not None or not studied
            layers.append(
                LayerSensitivity(
                    name=unit.name,
                    parameters=0 if unit.layer is None else unit.layer.weight_numel,
                    bits=own.get(unit.layer) if unit.layer is not None else None,
                    activation_bits=tuple(q.spec.bits for q in unit.quantizers if q in activations),
                    alone=next(remaining),
                    others=next(remaining),
                    at={n: next(remaining) for n in widths} if studied else {},
                )
            )
    return Sensitivity(what, images, floating, quantized, tuple(layers))


def _read(unit: Unit, activations: Set[Quantizer]) -> set[Quantizer]:
    """The studied activations that a unit reads."""
    return {quantizer for quantizer in unit.quantizers if quantizer in activations}


def check_widths(name: str, bits: Iterable[int]) -> list[int]:
    """The widths in rising order, without repeats; ValueError if one is not 2 to 8."""
    widths = list(bits)
    for width in widths:
        if type(width) is not int or not 2 <= width <= 8:
            raise ValueError(f"{name}: wanted whole numbers from 2 to 8, got {width!r}")
    return sorted(set(widths))
