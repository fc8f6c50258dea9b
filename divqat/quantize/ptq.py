"""Post-training quantization: ranges, rounding and biases from a few batches, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.modes import modes_kept
from divqat.nn._layer import QuantLayer
from divqat.nn.conv_bn import QuantConvBn2d
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.nn.function import QuantFunction
from divqat.ops.reference import weight_scale
from divqat.quantize.checks import check_is_prepared
from divqat.quantize.clip import ACTIVATION_RANGES, WEIGHT_RANGES, set_ranges, weight_clip
from divqat.quantize.equalize import equalize as equalize_layers
from divqat.quantize.ranges import observing
from divqat.quantize.round_weights import learn_rounding

ROUNDINGS = ("nearest", "learned")


@torch.no_grad()
def ptq(
    prepared: nn.Module,
    batches: Iterable[Tensor],
    *,
    activation_ranges: str = "minmax",
    percentile: float = 99.99,
    weight_ranges: str = "minmax",
    equalize: bool = False,
    rounding: str = "nearest",
    rounding_steps: int = 1000,
    bias_correction: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Quantize a prepared model without training it; returns ``prepared``.

    In this order:

    1. ``equalize``: channels between two layers get weights of similar size
       (:mod:`divqat.quantize.equalize`).
    2. Weights are put on their grids: the scale of each channel covers its largest weight
       (``weight_ranges="minmax"``) or has the least squared error (``"mse"``, which clips);
       ``rounding`` is to the nearest code, or learned layer by layer
       (:mod:`divqat.quantize.round_weights`).
    3. Each activation gets the range of its values in the model with quantized weights:
       ``"minmax"`` all of them; ``"average"`` the moving average of the batches' minimum and
       maximum; ``"percentile"`` without the largest and smallest 100 − ``percentile`` percent;
       ``"mse"`` and ``"entropy"`` the range with the least squared error, or the least KL
       divergence between the distributions of float and quantized values (TensorRT's), of 64
       candidates for each end, by a histogram of 2048 bins.
    4. ``bias_correction``: from the first layer to the last, the mean of each output channel
       becomes that of the float model (Nagel et al. 2019, arXiv 1906.04721, §4.2, from data
       instead of BatchNorm statistics). A layer without bias and BatchNorm is left alone.

    With ``weight_ranges="mse"`` or learned rounding, the float weights of the result are the
    quantized ones, of which an observed scale finds the same grid. Otherwise a weight is
    only quantized in the forward, as in training. Functional layers keep their weights.

    Args:
        prepared: made by :func:`divqat.prepare` with observed scales; its weights are those of the
            float model. Modes are restored; ranges are frozen.
        batches: inputs [N, …] of the model, which go to its device; a few hundred images will do.
        activation_ranges, percentile, weight_ranges, equalize, rounding, bias_correction: see
            above.
        rounding_steps: steps per layer of ``rounding="learned"``.
        seed: of the inputs that learned rounding chooses for each step.

    Raises:
        TypeError: ``batches`` are no tensors.
        ValueError: an unknown name, a number out of range, a model that is not prepared, has
            learned scales, weights whose grid is not symmetric about 0 where they are put on it, or
            was not traced but is to be equalized; or no batch.
        FloatingPointError: an activation is NaN or Inf.
    """
    for name, value, choices in (
        ("activation_ranges", activation_ranges, ACTIVATION_RANGES),
        ("weight_ranges", weight_ranges, WEIGHT_RANGES),
        ("rounding", rounding, ROUNDINGS),
    ):
        if value not in choices:
            raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile: wanted a number above 50 up to 100, got {percentile}")
    if rounding_steps < 1:
        raise ValueError(f"rounding_steps: wanted at least 1, got {rounding_steps}")
    places = weight_ranges != "minmax" or rounding != "nearest"
    _check_model(prepared, places)
    inputs = _checked(batches, next(prepared.parameters()).device)
    with modes_kept(prepared):
        prepared.eval()
        if equalize:
            equalize_layers(prepared)
        if places:
            learn = None
            if rounding == "learned":
                generator = torch.Generator().manual_seed(seed)
                learn = partial(learn_rounding, steps=rounding_steps, generator=generator)
            _place_weights(prepared, inputs, weight_ranges, learn)
        if activation_ranges == "average":
            with observing(prepared):
                for batch in inputs:
                    prepared(batch)
        else:
            with _off(prepared, weights=False):
                set_ranges(prepared, inputs, activation_ranges, percentile)
        if bias_correction:
            _correct_biases(prepared, inputs)
    for module in prepared.modules():
        if isinstance(module, FakeQuantize):
            module.disable_observer()
    return prepared


def _check_model(model: nn.Module, places: bool) -> None:
    check_is_prepared("prepared", model)
    for name, module in model.named_modules():
        if isinstance(module, LearnedStepFakeQuantize):
            raise ValueError(f"prepared: wanted observed scales, got a learned one in {name}")
        if places and isinstance(module, QuantLayer):
            low, high, _ = module.weight_grid()
            if low != -high:
                raise ValueError(
                    "prepared: wanted weights with narrow_range, whose grid is symmetric about 0, "
                    f"got {module.weight_spec} in {name}"
                )


def _checked(batches: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    inputs = list(batches)
    for batch in inputs:
        if not isinstance(batch, Tensor):
            raise TypeError(f"batches: wanted tensors [N, …], got {type(batch).__name__}")
    inputs = [batch.to(device) for batch in inputs if len(batch)]
    if not inputs:
        raise ValueError("batches: wanted at least one input, got none")
    return inputs


@contextmanager
def _off(model: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """A block in which no activation is quantized, and with ``weights`` no weight either."""
    layers = [m for m in model.modules() if weights and isinstance(m, QuantLayer)]
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    before = [q.fake_quant_enabled for q in quantizers], [m.weight_quant_enabled for m in layers]
    try:
        for quantizer in quantizers:
            quantizer.fake_quant_enabled = False
        for layer in layers:
            layer.weight_quant_enabled = False
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before[0], strict=True):
            quantizer.fake_quant_enabled = enabled
        for layer, enabled in zip(layers, before[1], strict=True):
            layer.weight_quant_enabled = enabled


def _calls(
    model: nn.Module, inputs: list[Tensor], layers: list[QuantLayer]
) -> Iterator[tuple[QuantLayer, tuple[Any, ...], Tensor]]:
    """Layer, arguments and a copy of the output of each call of ``layers``, in order."""
    calls: list[tuple[QuantLayer, tuple[Any, ...], Tensor]] = []

    def hook(layer: QuantLayer, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append((layer, args, output.clone()))  # a quantizer may overwrite the output

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        for batch in inputs:
            model(batch)
            yield from calls
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module, inputs: list[Tensor]) -> list[QuantLayer]:
    """The layers with a weight of their own, in the order of their first calls."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, QuantLayer) and not isinstance(module, QuantFunction)
    ]
    with _off(model):
        return list(dict.fromkeys(layer for layer, *_ in _calls(model, inputs[:1], layers)))


def _place_weights(
    model: nn.Module, inputs: list[Tensor], ranges: str, learn: Callable[..., Tensor] | None
) -> None:
    """Replace the weights by their quantized values, with ``learn`` for the rounding."""
    for layer in _layers(model, inputs):
        weight, factor = layer.scaled_weight()
        low, high, axis = layer.weight_grid()
        scale = weight_scale(weight, low, high, axis)
        if ranges == "mse":
            rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
            scale = weight_clip(rows, high).view_as(scale)
        if axis is not None:
            scale = scale.view([-1 if i == axis else 1 for i in range(weight.dim())])
        if learn is None:
            placed = (weight / scale).round().clamp(low, high) * scale
        else:
            with _off(model):
                target = torch.cat([output for *_, output in _calls(model, inputs, [layer])])
            with _off(model, weights=False):
                calls = [args for _, args, _ in _calls(model, inputs, [layer])]
            bias, rest = layer.folded()[1], calls[0][1:]
            placed = learn(
                lambda x, w, layer=layer, bias=bias, rest=rest: layer.compute(x, w, bias, *rest),
                torch.cat([args[0] for args in calls]), target, weight, scale, high,
            )  # fmt: skip
        if factor is not None:  # γ = 0 switches a channel off
            placed = torch.where(factor == 0, layer.weight, placed / factor)
        layer.weight.copy_(placed)


def _correct_biases(model: nn.Module, inputs: list[Tensor]) -> None:
    """Make the mean of each output channel of each layer that of the float model."""
    layers = _layers(model, inputs)
    with _off(model):
        wanted = _means(model, inputs, layers)
    for layer in layers:
        bias = layer.bn.bias if isinstance(layer, QuantConvBn2d) else layer.bias
        if bias is not None:
            error = _means(model, inputs, [layer])[layer] - wanted[layer]
            bias.sub_(error.to(bias.dtype))


def _means(
    model: nn.Module, inputs: list[Tensor], layers: list[QuantLayer]
) -> dict[QuantLayer, Tensor]:
    """The mean of each output channel, float64 [C]."""
    sums = dict[QuantLayer, Tensor]()
    counts = dict.fromkeys(layers, 0)
    for layer, _, output in _calls(model, inputs, layers):
        channels = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        sums[layer] = sums.get(layer, 0) + channels.double().sum(1)
        counts[layer] += channels.shape[1]
    return {layer: total / counts[layer] for layer, total in sums.items()}
