"""Take away from the answers what the lights and shades of a picture explain."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat._util.progress import progress
from divqat._util.settings import option
from divqat.attacks.answers import centred_logs, reading
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.data.batches import to_float
from divqat.nn.decoy import coarse_picture

REGRESSIONS = ("ridge", "network")
PENALTIES = 10.0 ** torch.arange(-6, 3, dtype=torch.float64)  # of ridge, beside a mean square
WIDTH, EPOCHS, BATCH, LR = 256, 30, 256, 1e-3  # of the network

# from what is known of images, float64 [N, D], and centred logarithms [N, K] of their answers, to
# a function that estimates these from that
Fit = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Residual(KnockoffNets):
    """KnockoffNets on what is left of each answer when its estimate from the picture is taken away.

    Ours, against :class:`divqat.nn.decoy.Decoy`, by a thief who knows how it works and not its
    seed. The decoy's centred log-probabilities are linear in the coarse picture. So a regression of
    c(log y), c(v) = v - mean(v), on the coarse picture finds them, and the clone learns

        r(softmax(c(log y) - estimate(coarse_picture(x)))),    r the ``reading``.

    Each half of the queries is estimated by a regression on the other half: otherwise a large
    regression would take away what the answers say of their own picture. No query more is asked.
    Of an undefended victim it takes away what classes have to do with lights and shades.

    Args:
        regression: ``ridge``, with the penalty that is best on the other half, or ``network``: two
            hidden layers, mean square error.
        reading: what the clone learns of the answers that are left.
    """

    regression: str = option("ridge", "What estimates the answers.", choices=REGRESSIONS)
    reading: str = option("standardized2", "What the clone learns of what is left.")

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        stored = task.folder.load("residual.pt")
        if stored is None:
            stored = {"answers": self._left(task, images, answers)}
            task.folder.save("residual.pt", stored)
        return images, reading(self.reading)(stored["answers"])

    def _left(self, task: Task, images: Tensor, answers: Tensor) -> Tensor:
        shades = torch.cat([coarse_picture(to_float(part)) for part in images.split(4096)]).double()
        logs = centred_logs(answers).double()
        torch.manual_seed(self.seed)
        if self.regression == "ridge":
            estimates = cross_fitted(ridge, shades, logs)
        else:
            estimates = cross_fitted(network_on(task.device), shades, logs)
        return (logs - estimates).softmax(1).float()


def cross_fitted(
    fit: Fit,
    inputs: Tensor,  # float64 [N, D]
    outputs: Tensor,  # float64 [N, K]
) -> Tensor:  # float64 [N, K]
    """Estimates of ``outputs``, of each random half by what is fitted to the other. A single row
    is estimated as 0."""
    if len(inputs) < 2:
        return torch.zeros_like(outputs)
    order = torch.randperm(len(inputs))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    estimates = torch.empty_like(outputs)
    for half, other in (halves, halves[::-1]):
        estimates[half] = fit(inputs[other], outputs[other])(inputs[half])
    return estimates


def ridge(inputs: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Linear regression with an intercept: the W of least

        mean |(x - mean x) W - (y - mean y)|^2 + p |W|^2,

    p the one of ``PENALTIES`` with the least generalized cross-validation error, N |residual|^2 /
    (N - degrees of freedom)^2 (Golub, Heath and Wahba, Technometrics 1979)."""
    x_mean, y_mean = inputs.mean(0), outputs.mean(0)
    u, s, vt = torch.linalg.svd(inputs - x_mean, full_matrices=False)
    count = len(inputs)
    projected = u.T @ (outputs - y_mean)  # [R, K]
    shares = s**2 / (s**2 + count * PENALTIES[:, None])  # [P, R]
    rest = ((1 - shares)[:, :, None] * projected).square().sum((1, 2))
    rest = rest + (outputs - y_mean).square().sum() - projected.square().sum()
    errors = rest / (count - 1 - shares.sum(1)).clamp(min=1e-9).square()
    best = shares[errors.argmin()]
    weight = vt.T @ ((best / s.clamp(min=1e-12))[:, None] * projected)
    return lambda other: (other - x_mean) @ weight + y_mean


def network_on(device: torch.device) -> Fit:
    """A regression by a network with two hidden layers, of mean square error, by Adam. A fifth of
    the rows chooses the epoch."""

    def fit(inputs: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        mean, spread = inputs.mean(0), inputs.std(0, unbiased=False).clamp(min=1e-6)

        def scaled(x: Tensor) -> Tensor:
            return ((x - mean) / spread).float().to(device)

        layers: list[nn.Module] = []
        for before, after in pairwise((inputs.shape[1], WIDTH, WIDTH)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        network = nn.Sequential(*layers, nn.Linear(WIDTH, outputs.shape[1])).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), LR)
        x, y = scaled(inputs), outputs.float().to(device)
        held = len(x) // 5
        least, best = math.inf, copy.deepcopy(network.state_dict())
        for _ in progress(range(EPOCHS), "regression", total=EPOCHS, unit="epoch"):
            for rows in (held + torch.randperm(len(x) - held)).to(device).split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(network(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                error = float(F.mse_loss(network(x[:held]), y[:held])) if held else -math.inf
            if error < least or not held:
                least, best = error, copy.deepcopy(network.state_dict())
        network.load_state_dict(best)

        @torch.no_grad()
        def estimate(other: Tensor) -> Tensor:
            return network(scaled(other)).double().cpu()

        return estimate

    return fit
