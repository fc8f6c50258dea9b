"""Learn only the answers that the victim is surest of."""

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
    """KnockoffNets on the share of its queries whose answers have the largest top probability.

    Ours, against victims that mislead about images unlike their own: where such a victim is sure,
    it may mean it. The share is taken of each answered class by itself, for a victim may answer
    all that is foreign to it with one class, and surely. Every query is asked and counted, those
    that are dropped, too; the :class:`Extraction` has all of them.

    Answers that show a label alone are all equally sure: then the earlier queries are kept.

    Args:
        keep: this share of the queries of each answered class, rounded, but at least one.
        reading: what the clone learns of the answers that are kept.
    """

    keep: float = option(0.5, "Share of the answers of each class to learn.", above=0, most=1)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        rows = surest(answers, self.keep)
        return super()._targets(task, images[rows], answers[rows])


def surest(answers: Tensor, share: float) -> Tensor:  # [N, num_classes] -> int64 [M], ascending
    """Of the rows with each top-1 class the ``share`` with the largest entries, at least one.

    Of equal rows the earlier ones; of equal entries in a row the first is the top-1 class.
    """
    label, top = label_only(answers).argmax(1), answers.amax(1)
    kept = []
    for name in label.unique():
        rows = (label == name).nonzero()[:, 0]
        order = top[rows].sort(descending=True, stable=True).indices
        kept.append(rows[order[: max(1, round(share * len(rows)))]])
    return torch.cat(kept).sort().values
