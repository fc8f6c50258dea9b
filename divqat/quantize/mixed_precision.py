"""Choose the width of each layer's weight from what it costs there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from divqat._util.text import columns
from divqat.nn._layer import SPREAD_BITS, QuantLayer
from divqat.quantize.bypass import Switches, unchanged
from divqat.quantize.knapsack import cheapest
from divqat.quantize.scores import Score, measure
from divqat.quantize.sensitivity import check_widths


@dataclass(frozen=True)
class MixedPrecision:
    """The result of :func:`mixed_precision`; ``str()`` is a table.

    Attributes:
        layer_bits: the chosen width of each layer's weight, by name; a value for ``layer_bits`` of
            :class:`divqat.QuantConfig`.
        budget: bits per weight that were allowed.
        criterion: ``"loss"`` or ``"divergence"``.
        parameters: number of elements of each layer's weight.
        costs: by layer and width, the measured increase of the criterion, in nats, over float
            weights.
        predicted: the sum of the chosen costs.
        measured: the cost of the chosen widths all together.
        images: number of images.
        floating: the float model, the reference of all scores.
        activations: float weights, and activations as prepared.
        before: the model as prepared.
        after: with the chosen widths, all together.
        uniform: every weight with ``uniform_bits``, the largest allowed width within the budget.
        bits_before: width of each layer's weight as prepared.
    """

    layer_bits: dict[str, int]
    budget: float
    criterion: str
    parameters: dict[str, int]
    costs: dict[str, dict[int, float]]
    predicted: float
    measured: float
    images: int
    floating: Score
    activations: Score
    before: Score
    after: Score
    uniform: Score
    uniform_bits: int
    bits_before: dict[str, int]

    def bytes(self, bits: dict[str, int]) -> float:
        """The size of all weights with these widths, packed; without scales and biases."""
        return sum(self.parameters[name] * width for name, width in bits.items()) / 8

    def bits_per_weight(self, bits: dict[str, int]) -> float:
        """The mean width of all weights."""
        return 8 * self.bytes(bits) / sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with sizes in bytes."""
        return asdict(self) | {
            "bytes_before": self.bytes(self.bits_before),
            "bytes_after": self.bytes(self.layer_bits),
            "bits_per_weight": self.bits_per_weight(self.layer_bits),
        }

    def __str__(self) -> str:
        widths = sorted({width for costs in self.costs.values() for width in costs})
        lines = [["layer", "weights", "bits", *(f"cost at {width}" for width in widths)]]
        for name, costs in self.costs.items():
            cells = [f"{costs[width]:.5f}" for width in widths]
            lines.append([name, f"{self.parameters[name]}", f"{self.layer_bits[name]}", *cells])
        table = columns(lines)
        lines = [["weights", "bits/weight", "KiB", "loss", "accuracy", "agree", "SQNR dB"]]
        names = ("all float", "float", "as prepared", "chosen", f"all {self.uniform_bits} bits")
        scores = (self.floating, self.activations, self.before, self.after, self.uniform)
        same = dict.fromkeys(self.parameters, self.uniform_bits)
        sizes = (None, None, self.bits_before, self.layer_bits, same)
        for name, score, bits in zip(names, scores, sizes, strict=True):
            lines.append([name, *self._size(bits), *score.cells()])
        return (
            f"cost of a layer's weight with these bits: {self.criterion} in nats\n{table}\n\n"
            f"{columns(lines)}\n"
            f"{self.criterion} of the chosen widths: {self.predicted:.5f} predicted, "
            f"{self.measured:.5f} measured"
        )

    def _size(self, bits: dict[str, int] | None) -> tuple[str, str]:
        if bits is None:
            return "-", "-"
        return f"{self.bits_per_weight(bits):.2f}", f"{self.bytes(bits) / 1024:.1f}"


def mixed_precision(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float,
    *,
    bits: Iterable[int] | None = None,
    criterion: str = "divergence",
) -> MixedPrecision:
    """Choose the width of each layer's weight such that all weights together have at most
    ``budget`` bits per weight, with the least sum of measured costs.

    A cost is what the criterion increases by when this weight alone has this width, and the other
    weights are float; activations are quantized as prepared throughout. The costs of the layers are
    added, as if they did not depend on each other; HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852)
    does so with costs that it estimates from the Hessian. :func:`divqat.quantize.knapsack.cheapest`
    minimizes the sum. The chosen widths are then measured all together, and for comparison one
    width for all weights. First and last layer are chosen by their numbers, like the others.

    Nothing is trained; low widths usually need a training with them: ``prepare(float_model,
    replace(config, layer_bits=result.layer_bits), example_input)``.

    The size is that of packed weights, without scales and biases. An ONNX file holds a byte per
    weight at any width.

    Args:
        model: see :func:`divqat.sensitivity`; it is restored in the same way.
        batches: the same, but read three times: a list or a loader, not an iterator.
        budget: bits per weight on average, from the smallest of ``bits`` up.
        bits: the widths to choose from, 2 to 8. None: 2 to 8, or 2 to 7 if activations are
            unsigned, as 8-bit weights can then saturate on CPUs without VNNI.
        criterion: ``"divergence"`` KL(p‖q) of the answers q from the answers p with float weights,
            which is the increase of the cross-entropy with p in place of the labels; or ``"loss"``,
            the increase of the cross-entropy with the labels. That of the first is never negative
            and has much less noise: with few images the loss of a single layer hardly shows.

    Raises:
        TypeError: as for ``sensitivity``, or ``batches`` is an iterator.
        ValueError: as for ``sensitivity``, or the budget is below the smallest width, or the
            criterion is unknown or lacks labels.
        FloatingPointError: a logit is NaN or Inf.
    """
    if criterion not in ("loss", "divergence"):
        raise ValueError(f"criterion: wanted loss or divergence, got {criterion!r}")
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches: wanted a list or a loader, which can be read again, got "
            f"{type(batches).__name__}"
        )
    with unchanged(model):
        switches = Switches(model)
        widths = _default_widths(switches) if bits is None else check_widths("bits", bits)
        if not widths:
            raise ValueError("bits: wanted at least one width, got none")
        if not (isinstance(budget, (int, float)) and budget >= widths[0]):
            raise ValueError(
                f"budget: wanted at least {widths[0]} bits per weight, the smallest width, got "
                f"{budget!r}"
            )
        return _choose(model, batches, switches, float(budget), widths, criterion)


def _default_widths(switches: Switches) -> list[int]:
    signed = all(quantizer.spec.signed for quantizer in switches.quantizers)
    return list(range(2, (8 if signed else SPREAD_BITS) + 1))


def _choose(
    model: nn.Module,
    batches: Iterable[Any],
    switches: Switches,
    budget: float,
    widths: list[int],
    criterion: str,
) -> MixedPrecision:
    layers = {unit.name: unit.layer for unit in switches.units if unit.layer is not None}
    quantizers = set(switches.quantizers)

    def setting(weights: dict[QuantLayer, int]) -> Any:
        return partial(switches.apply, weights, quantizers)

    tried = [setting({layer: width}) for layer in layers.values() for width in widths]
    (base, *scores), images = measure(
        model, batches, [setting({}), *tried], description="cost of each width"
    )
    remaining = iter(_costs(base, scores, criterion))
    costs = {name: {width: next(remaining) for width in widths} for name in layers}
    parameters = {name: layer.weight_numel for name, layer in layers.items()}
    capacity = math.floor(min(budget, widths[-1]) * sum(parameters.values()) + 1e-6)
    sizes = [[n * width for width in widths] for n in parameters.values()]
    choice = cheapest(sizes, [list(cost.values()) for cost in costs.values()], capacity)
    chosen = {name: widths[i] for name, i in zip(layers, choice, strict=True)}
    weights = {layers[name]: width for name, width in chosen.items()}
    (base, joint), _ = measure(
        model, batches, [setting({}), setting(weights)], description="cost of the choice"
    )
    own = switches.bits()
    uniform = max(width for width in widths if width <= budget)
    runs = [{}, own, weights, dict.fromkeys(layers.values(), uniform)]
    (floating, activations, before, after, plain), _ = measure(
        model,
        batches,
        [partial(switches.apply, {}, ()), *map(setting, runs)],
        description="chosen widths",
    )
    return MixedPrecision(
        layer_bits=chosen,
        budget=budget,
        criterion=criterion,
        parameters=parameters,
        costs=costs,
        predicted=sum(costs[name][width] for name, width in chosen.items()),
        measured=_costs(base, [joint], criterion)[0],
        images=images,
        floating=floating,
        activations=activations,
        before=before,
        after=after,
        uniform=plain,
        uniform_bits=uniform,
        bits_before={name: own[layer] for name, layer in layers.items()},
    )


def _costs(base: Score, scores: list[Score], criterion: str) -> list[float]:
    """The increase of the criterion over ``base``, the reference of the scores."""
    if criterion == "divergence":
        return [score.divergence for score in scores]
    if base.loss is None:
        raise ValueError("criterion: wanted divergence without labels, got loss")
    return [score.loss - base.loss for score in scores if score.loss is not None]
