"""Reductions of probabilities that victims, defenses and attackers share."""

from __future__ import annotations

import torch
from torch import Tensor


def distributions(answers: Tensor) -> Tensor:  # [N, num_classes] -> rows of sum 1
    """Answers scaled to sum 1; an all-zero row, which rounding can produce, becomes uniform.

    Negative entries, which the formulas of some defenses produce, count as 0.
    """
    answers = answers.clamp(min=0)
    total = answers.sum(1, keepdim=True)
    return torch.where(total > 0, answers / total, 1 / answers.shape[1])


def label_only(scores: Tensor) -> Tensor:  # [N, num_classes] -> one-hot rows
    """The class with the largest score; ties go to the lower index."""
    return keep_top(torch.ones_like(scores), 1, by=scores)


def keep_top(probs: Tensor, k: int, *, by: Tensor | None = None) -> Tensor:
    """Set all but k entries of each row to zero.

    Args:
        probs: [N, num_classes].
        k: number of entries to keep, at least 1.
        by: scores [N, num_classes] whose k largest are kept; None: ``probs``. Ties go to the lower
            class index.

    Raises:
        ValueError: ``k`` exceeds the number of classes.
    """
    if k > probs.shape[1]:
        raise ValueError(f"k: wanted at most the {probs.shape[1]} classes, got {k}")
    order = probs if by is None else by
    top = order.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(probs).scatter(1, top, probs.gather(1, top))
