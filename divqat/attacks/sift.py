"""Leave out the answers that where a picture is light explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from divqat._util.settings import option
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.data.batches import to_float
from divqat.nn.decoy import coarse
from divqat.victim.answers import label_only

DECAY = 1e-4  # of the regression's weights, beside a mean cross-entropy
ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class Sift(KnockoffNets):
    """KnockoffNets on the answers that are least likely to be a decoy's.

    Ours, against :class:`divqat.nn.decoy.Decoy`, by a thief who knows how it works and not its
    seed: a multinomial regression on the coarse pictures learns the decoy from all answers, and
    those stay that it gives the lowest probability. Against an undefended victim it makes a worse
    clone than all answers do. Every query is asked and counted; the :class:`Extraction` has all.

    Args:
        keep: this share of the queries, rounded, at least one.
        reading: what the clone learns of the answers that are kept.
    """

    keep: float = option(0.15, "Share of the answers to learn.", above=0, most=1)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        count = max(1, round(self.keep * len(images)))
        order = explained(images, answers).sort(stable=True).indices
        rows = order[:count].sort().values
        return super()._targets(task, images[rows], answers[rows])


def explained(
    images: Tensor,  # uint8 [N, C, H, W]
    answers: Tensor,  # [N, num_classes]
) -> Tensor:  # float64 [N]
    """log p of each answer's top-1 class, by a regression on where the pictures are light."""
    label = label_only(answers).argmax(1)
    shades = coarse(to_float(images)).double()
    inputs = torch.cat([shades, torch.ones(len(images), 1, dtype=torch.float64)], 1)
    weight = torch.zeros(inputs.shape[1], answers.shape[1], dtype=torch.float64)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight, label) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)  # convex: from any start the same
    with torch.no_grad():
        return -F.cross_entropy(inputs @ weight, label, reduction="none")
