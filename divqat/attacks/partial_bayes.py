"""Partial Bayes: look released answers up among those that the known defense would release."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divqat._util.progress import progress
from divqat._util.settings import option
from divqat.attacks.attack import Task
from divqat.attacks.recovery import Recovery

DISTANCES = 2**24  # held in memory at once


@dataclass(frozen=True, kw_only=True)
class PartialBayes(Recovery):
    """The attack of Tang et al. (ModelGuard, USENIX Security 2024) with a table of pairs (y, y').

    The estimate of the clean answer is the mean of the y whose y' lies near the released answer:
    its expectation under the prior, see :meth:`Recovery._dirichlet`, given what was released.

    Args:
        tolerance: the L1 distance that is near. Where no y' is, the nearest one counts, as in the
            published code.
    """

    tolerance: float = option(0.01, "L1 distance up to which answers count as equal.", least=0)

    def _recover(self, task: Task, images: Tensor, answers: Tensor) -> Tensor:
        clean, rows = self._dirichlet(answers)
        released = self._release(clean, images, rows, answers)
        answers, clean, released = (x.to(task.device) for x in (answers, clean, released))
        return look_up(answers, clean, released, self.tolerance).cpu()


def look_up(
    answers: Tensor,  # [N, C]
    clean: Tensor,  # [M, C]
    released: Tensor,  # [M, C], of `clean`
    tolerance: float,
) -> Tensor:  # [N, C]
    """The mean of the rows of ``clean`` whose ``released`` has the answer's top-1 class and an L1
    distance to it of at most ``tolerance``, or of the smallest there is.

    An answer whose top-1 class the table does not have stays as it is. The published code compares
    the answer's top-1 with that of ``clean``, and only where the defense keeps it; with that of
    ``released`` one rule serves all defenses.
    """
    estimates = answers.clone()
    for top1 in progress(answers.argmax(1).unique().tolist(), "look up", unit="class"):
        there = released.argmax(1) == top1
        if not there.any():
            continue
        y, y_released = clean[there], released[there]
        mine = (answers.argmax(1) == top1).nonzero()[:, 0]
        for rows in mine.split(max(1, DISTANCES // len(y))):
            distance = torch.cdist(answers[rows], y_released, p=1)  # [rows, pairs]
            nearest = distance.amin(1, keepdim=True)
            near = (distance <= nearest.clamp(min=tolerance)).float()
            # ŷ = mean of {y : |y' - answer|_1 <= max(tolerance, smallest distance)}
            estimates[rows] = near @ y / near.sum(1, keepdim=True)
    return estimates
