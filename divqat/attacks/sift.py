"""Drop the answers that the brightness map of an image explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from divqat._util.settings import option
from divqat.attacks.answers import lowest
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.data.batches import to_float
from divqat.nn.decoy import coarse_picture
from divqat.victim.answers import label_only

DECAY = 1e-4  # of the regression's weights, beside a mean cross-entropy
ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class Sift(KnockoffNets):
    """KnockoffNets on the answers that are least likely to come from a decoy.

    Ours, against :class:`divqat.nn.decoy.Decoy`, by an attacker who knows how it works but not its
    seed: a multinomial regression on coarse pictures learns the decoy from all answers, and those
    with the lowest probability under it are kept. Against an undefended victim the clone is worse
    than one from all answers. Dropped queries count, too, and are part of the :class:`Extraction`.

    Args:
        keep: share of the queries, rounded, at least one.
        reading: how a kept answer becomes the clone's target.
    """

    keep: float = option(0.15, "Share of the answers to learn.", above=0, most=1)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        rows = lowest(decoy_likelihood(images, answers), self.keep)
        return super()._targets(task, images[rows], answers[rows])


def decoy_likelihood(
    images: Tensor,  # uint8 [N, C, H, W]
    answers: Tensor,  # [N, num_classes]
) -> Tensor:  # float64 [N]
    """log p of each answer's top-1 class under a regression on coarse pictures."""
    label = label_only(answers).argmax(1)
    shades = coarse_picture(to_float(images)).double()
    inputs = torch.cat([shades, torch.ones(len(images), 1, dtype=torch.float64)], 1)
    weight = torch.zeros(inputs.shape[1], answers.shape[1], dtype=torch.float64)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight, label) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)  # convex: the start does not matter
    with torch.no_grad():
        return -F.cross_entropy(inputs @ weight, label, reduction="none")
