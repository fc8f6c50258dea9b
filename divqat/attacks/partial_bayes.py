"""Partial Bayes: look up released answers among those that the known defense would release."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divqat._util.progress import progress
from divqat._util.settings import option
from divqat.attacks.attack import Task
from divqat.attacks.recovery import Recovery

DISTANCES = 2**24  # held in memory at the same time


@dataclass(frozen=True, kw_only=True)
class PartialBayes(Recovery):
    """The attack of Tang et al. (ModelGuard, USENIX Security 2024) with a table of pairs (y, y').

    The estimate of the clean answer is the mean of the y whose y' lies near the released answer:
    its expectation under the prior, see :meth:`Recovery._dirichlet`, given the released answer.

    Args:
        tolerance: the L1 distance up to which y' counts as near. If there is none, the nearest y'
            counts, as in the published code.
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
    distance to it of at most ``tolerance`` or, if that is larger, the smallest distance.

    An answer whose top-1 class is not in the table is returned unchanged. The published code
    compares the answer's top-1 with that of ``clean``, and only if the defense keeps it; comparing
    with ``released`` is one rule for all defenses.
    """
    estimates = answers.clone()
    for top1 in progress(answers.argmax(1).unique().tolist(), "look up", unit="class"):
        pairs = released.argmax(1) == top1
        if not pairs.any():
            continue
        y, y_released = clean[pairs], released[pairs]
        same_class = (answers.argmax(1) == top1).nonzero()[:, 0]
        for rows in same_class.split(max(1, DISTANCES // len(y))):
            distance = torch.cdist(answers[rows], y_released, p=1)  # [rows, pairs]
            nearest = distance.amin(1, keepdim=True)
            near = (distance <= nearest.clamp(min=tolerance)).float()
            # ŷ = mean of {y : |y' - answer|_1 <= max(tolerance, smallest distance)}
            estimates[rows] = near @ y / near.sum(1, keepdim=True)
    return estimates
