"""Fake quantization of many weights in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from divqat.ops import reference
from divqat.ops._autograd import batched
from divqat.ops._check import (
    check_axis,
    check_device,
    check_float,
    check_range,
    check_untransformed,
)
from divqat.ops._library import op, register


def fake_quantize_weights(
    weights: Iterable[Tensor],  # each any shape
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = 0,
) -> list[Tensor]:
    """Symmetric fake quantization of a list of weights, with the scales of their rows.

    scale = 2 · max|row| / (quant_max − quant_min), zero point 0; value and gradient are those of
    :func:`fake_quantize` with a constant scale. A code range that is symmetric about zero clips
    nothing, so the gradient passes unchanged, at no cost. Otherwise the backward recomputes the
    mask from the weights, and only the weights themselves are saved.

    Args:
        weights: float32, float64, bfloat16 or float16 tensors of any shape, on one device.
        quant_min: smallest code, usually −(2^(bits−1) − 1).
        quant_max: largest code.
        ch_axis: the channel axis of each weight; None for one scale per weight.

    Returns:
        One tensor like each weight.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: see :func:`fake_quantize`.
    """
    check_untransformed("fake_quantize_weights")
    check_range(quant_min, quant_max)
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        raise TypeError(f"weights: wanted several Tensors, got {type(weights).__name__}")
    weights = list(weights)
    if not weights:
        return []
    for i, w in enumerate(weights):
        check_float(f"weights[{i}]", w)
        check_device(f"weights[{i}]", w, weights[0].device, "weights[0]")
        check_axis(w, ch_axis, f"weights[{i}]")
    return list(FakeQuantizeWeights.apply(quant_min, quant_max, ch_axis, *weights))


def _clips_nothing(quant_min: int, quant_max: int) -> bool:
    """Whether every finite weight is in the range of its row's scale.

    The largest code is max|row| · (1 / (max|row| / quant_max)) = quant_max · (1 + 4e), with
    |e| < 2⁻²³ for the roundings of float32; it rounds to quant_max as long as quant_max · 2⁻²¹ is
    below half a step.
    """
    return quant_min == -quant_max and quant_max < 2**16


def _masked(grads: list[Tensor], weights: list[Tensor], *args: Any) -> list[Tensor]:
    if batched(*grads):
        return reference.fake_quantize_weights_backward_ref(grads, weights, *args)
    return op("fake_quantize_weights_backward")(grads, weights, *args)


class FakeQuantizeWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *ctx.range, weights = *args[:3], args[3:]
        ctx.straight_through = _clips_nothing(*args[:2])
        # A weight whose output is unused must get no gradient: with zeros weight decay would apply.
        ctx.set_materialize_grads(False)
        if not ctx.straight_through:
            ctx.save_for_backward(*weights)
        return tuple(op("fake_quantize_weights")(list(weights), *ctx.range))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.straight_through:
            return (None, None, None, *grads)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        saved = ctx.saved_tensors  # read once: under a checkpoint every access recomputes them
        weights, used_grads = [saved[i] for i in used], [grads[i] for i in used]
        if torch.is_grad_enabled():  # create_graph=True
            masked = WeightGrads.apply(*ctx.range, len(weights), *weights, *used_grads)
        else:
            masked = _masked(used_grads, weights, *ctx.range)
        result: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(used, masked, strict=True):
            result[i] = grad
        return (None, None, None, *result)


class WeightGrads(torch.autograd.Function):
    """Masked gradients: linear in ``grads``, so it is its own derivative (double backward)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *ctx.range, count = args[:4]
        weights, grads = args[4 : 4 + count], args[4 + count :]
        ctx.save_for_backward(*weights)
        return tuple(_masked(list(grads), list(weights), *ctx.range))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        masked = WeightGrads.apply(*ctx.range, len(weights), *weights, *grads)
        return (*[None] * (4 + len(weights)), *masked)


register(
    "fake_quantize_weights",
    reference.fake_quantize_weights_ref,
    lambda weights, *args: [torch.empty_like(w) for w in weights],
)
register(
    "fake_quantize_weights_backward",
    reference.fake_quantize_weights_backward_ref,
    lambda grads, weights, *args: [torch.empty_like(w) for w in weights],
)
