"""Gradients of a function that can only be evaluated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def zeroth_order(
    d: Callable[[Tensor], Tensor],  # [N, C, H, W] -> [N]
    x: Tensor,  # [N, C, H, W]
    value: Tensor,  # d(x), [N]
    directions: int,
    smoothing: float,
) -> Tensor:  # like x
    """A forward-difference estimate of the gradient of d(x_n) by x_n, for images x_n of D pixels.

        (D/m) Σ_i [d(x + ε u_i) - d(x)] / ε · u_i,    u_i uniform on the unit sphere of R^D

    Its expectation is the gradient up to terms that vanish with ε (``smoothing``). d is called m
    times (``directions``) under ``no_grad``. u comes from torch's global generator.
    """
    total = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(directions):
            u = torch.randn_like(x)
            u /= u.flatten(1).norm(dim=1)[:, None, None, None]
            total += ((d(x + smoothing * u) - value) / smoothing)[:, None, None, None] * u
    return x[0].numel() / directions * total
