"""Learn only the victim's most confident answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divqat._util.settings import option
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.victim.answers import label_only


@dataclass(frozen=True, kw_only=True)
class Selective(KnockoffNets):
    """KnockoffNets on the queries whose answers have the largest top probability.

    Ours, against victims that give misleading answers to foreign images: their confident answers
    may be right. The share is taken within each predicted class, as a victim may give all foreign
    images one class with high confidence. Dropped queries count, too, and are part of the
    :class:`Extraction`.

    Hard labels are all equally confident: then the earlier queries are kept.

    Args:
        keep: share of the queries of each predicted class, rounded, but at least one.
        reading: how a kept answer becomes the clone's target.
    """

    keep: float = option(0.5, "Share of the answers of each class to learn.", above=0, most=1)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        rows = most_confident(answers, self.keep)
        return super()._targets(task, images[rows], answers[rows])


def most_confident(
    answers: Tensor,  # [N, num_classes]
    share: float,
) -> Tensor:  # int64 [M], ascending
    """For each top-1 class, the ``share`` of its rows with the largest entries, at least one.

    Ties go to the earlier row, and within a row to the first class.
    """
    label, top = label_only(answers).argmax(1), answers.amax(1)
    kept = []
    for name in label.unique():
        rows = (label == name).nonzero()[:, 0]
        order = top[rows].sort(descending=True, stable=True).indices
        kept.append(rows[order[: max(1, round(share * len(rows)))]])
    return torch.cat(kept).sort().values
