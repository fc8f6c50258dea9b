"""Rounding of weights that is learned layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The stretched sigmoid, the weight of the penalty and the share of steps without it.
LOW, HIGH, PENALTY, WARMUP = -0.1, 1.1, 10.0, 0.2
BATCH = 32


def learn_rounding(
    compute: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,  # [N, …]
    target: Tensor,  # [N, …]
    weight: Tensor,
    scale: Tensor,  # broadcasts with weight
    quant_max: int,
    *,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """``weight``, each rounded up or down to a multiple of ``scale`` within ±quant_max, so that the
    output of the layer differs least from ``target``: AdaRound (Nagel et al. 2020, arXiv
    2004.10568, equations 21 to 25).

    The loss is ‖compute(x, Ŵ) − target‖², relative to that of rounding to nearest, plus 10 times
    the mean of 1 − |2h(V) − 1|^β, with Ŵ = scale · (⌊W / scale⌋ + h(V)) and β from 20 to 2. At the
    end h(V) is rounded. A weight at an end of the grid stays there, since a channel's scale follows
    from its largest weight.

    Args:
        compute: (inputs, weight) → output of the layer.
        inputs: what the layer reads in the quantized model.
        target: its output in the float model.
        weight, scale, quant_max: the float weight and its grid.
        steps: of Adam, with 32 inputs each.
        generator: chooses the inputs; on the CPU.

    Returns:
        The rounded weight. Its error on all inputs is at most that of rounding to nearest, which is
        returned if learning found nothing better.
    """
    codes = (weight / scale).clamp(-quant_max, quant_max)
    nearest, floor = codes.round(), codes.floor()
    ends = nearest.abs() == quant_max
    part = ((codes - floor - LOW) / (HIGH - LOW)).clamp(1e-4, 1 - 1e-4)
    v = (part / (1 - part)).log().requires_grad_()

    def rounded(h: Tensor) -> Tensor:
        return torch.where(ends, nearest, (floor + h).clamp(-quant_max, quant_max)) * scale

    plain = rounded(nearest - floor)
    before = _error(compute, inputs, target, plain)
    if not before > 0:
        return plain
    optimizer = torch.optim.Adam([v], lr=3e-2)
    for step in range(steps):
        rows = torch.randint(len(inputs), (BATCH,), generator=generator).to(inputs.device)
        with torch.enable_grad():
            h = (v.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
            loss = (compute(inputs[rows], rounded(h)) - target[rows]).square().mean() / before
            progress = (step / steps - WARMUP) / (1 - WARMUP)
            if progress > 0:
                beta = 20 + (2 - 20) * progress
                loss = loss + PENALTY * (1 - (2 * h - 1).abs().pow(beta)).mean()
            (v.grad,) = torch.autograd.grad(loss, v)
        optimizer.step()
    learned = rounded((v.detach() > 0).to(weight.dtype))
    return learned if _error(compute, inputs, target, learned) < before else plain


def _error(
    compute: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, target: Tensor, weight: Tensor
) -> float:
    """The mean squared error of the layer's output over all inputs."""
    parts = zip(inputs.split(256), target.split(256), strict=True)
    total = sum((compute(x, weight) - y).double().square().sum().item() for x, y in parts)
    return total / target.numel()
