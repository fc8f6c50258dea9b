"""What is shown of probabilities: by the victim, by a defense, to an attacker who reads on."""

from __future__ import annotations

import torch
from torch import Tensor


def distributions(answers: Tensor) -> Tensor:  # [N, num_classes] -> rows of sum 1
    """Answers scaled to sum 1; a row without mass, which rounding can leave, becomes uniform.

    Negative entries, which some defenses' formulas allow, count as 0.
    """
    answers = answers.clamp(min=0)
    total = answers.sum(1, keepdim=True)
    return torch.where(total > 0, answers / total, 1 / answers.shape[1])


def label_only(scores: Tensor) -> Tensor:  # [N, num_classes] -> one-hot rows
    """The class with the largest score, the lower one of two."""
    return keep_top(torch.ones_like(scores), 1, by=scores)


def keep_top(probs: Tensor, k: int, *, by: Tensor | None = None) -> Tensor:
    """Zero in place of all but k entries of each row.

    Args:
        probs: [N, num_classes].
        k: how many stay, at least 1.
        by: scores [N, num_classes] of which the k largest stay; None: ``probs``. Ties go to the
            lower class index.

    Raises:
        ValueError: ``k`` is more than there are classes.
    """
    if k > probs.shape[1]:
        raise ValueError(f"k: wanted at most the {probs.shape[1]} classes, got {k}")
    order = probs if by is None else by
    top = order.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(probs).scatter(1, top, probs.gather(1, top))
