"""Find out what the victim's classes mean with a few labeled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from divqat._util.errors import require
from divqat._util.settings import option
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.labeled import LabeledAttack
from divqat.metrics import predict

MAPS = ("permutation", "any")
NEVER = -1e9  # logit of a class that no class of the clone means: finite, and below any other


@dataclass(frozen=True, kw_only=True)
class Relabel(LabeledAttack, KnockoffNets):
    """KnockoffNets whose clone's classes get the meaning that labeled images give them.

    Ours, against victims that answer images unlike their own with wrong classes: a clone of such
    answers may tell the classes apart and only misname them. n_jk labeled images of class k are
    answered with class j by the trained clone. The classes j mean those m(j) for which

        sum_j n_j,m(j)

    is largest, under ``permutation`` among one-to-one maps (an assignment problem, solved by
    ``scipy.optimize.linear_sum_assignment``), under ``any`` among all. Of equal maps that one
    counts which leaves most classes as they are. The result is a :class:`Relabeled`, as is what
    ``watch`` sees after each epoch.

    Args:
        map: ``permutation`` or ``any``.

    Raises:
        ImportError: ``permutation`` without SciPy.
        Others: see :class:`LabeledAttack`.
    """

    map: str = option("permutation", "Which maps between classes are tried.", choices=MAPS)

    def _extract(self, task: Task) -> Extraction:
        labeled = self._labeled(task)
        meanings = fitting(self.map)  # here, as what is missing must cost no query

        def relabeled(clone: nn.Module) -> nn.Module:
            answered = predict(clone, labeled.images).argmax(1)
            counts = torch.zeros(task.classes, task.classes, dtype=torch.int64)
            once = torch.ones_like(answered)
            counts.index_put_((answered, labeled.labels.cpu()), once, accumulate=True)
            return Relabeled(clone, meanings(counts).to(task.device)).eval()

        watched = replace(task, watch=lambda clone, count: task.watch(relabeled(clone), count))
        found = super()._extract(watched)
        return replace(found, clone=relabeled(found.clone))


class Relabeled(nn.Module):
    """A classifier whose class j means class ``meaning[j]``.

    Where several classes mean one, its probability is the sum of theirs: its logit is the logarithm
    of the sum of their exponentials. A class that none means gets the logit ``NEVER``.

    Args:
        clone: images to logits [N, num_classes].
        meaning: int64 [num_classes], entries from 0 to num_classes - 1.
    """

    meaning: Tensor

    def __init__(self, clone: nn.Module, meaning: Tensor) -> None:
        super().__init__()
        self.clone = clone
        self.register_buffer("meaning", meaning)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.clone(images)
        index = self.meaning.expand_as(logits)
        # g_k = max_j z_j + log sum_j exp(z_j - max), over the j that mean k: exact where one does
        top = torch.full_like(logits, NEVER).scatter_reduce(1, index, logits, "amax")
        parts = (logits - top.gather(1, index)).exp()
        sums = torch.zeros_like(logits).scatter_add(1, index, parts)
        return top + sums.clamp(min=1).log()  # below 1, it is 0: no j means k, and NEVER stays


def fitting(kind: str) -> Callable[[Tensor], Tensor]:
    """A function from counts n_jk (int64 [C, C]: images of class k answered with class j) to what
    the classes j mean, int64 [C].

    Args:
        kind: of the maps that are allowed: ``permutation`` or ``any``, see :class:`Relabel`.

    Raises:
        ImportError: ``permutation`` without SciPy.
    """
    if kind == "any":
        return lambda counts: _preferring_itself(counts).argmax(1)
    assign = require("scipy.optimize", "data").linear_sum_assignment
    return lambda counts: torch.from_numpy(assign(_preferring_itself(counts).numpy(), True)[1])


def _preferring_itself(counts: Tensor) -> Tensor:  # int64 [C, C] -> like counts
    """Counts among which equal maps differ by how many classes keep their meaning, at most C."""
    classes = len(counts)
    return counts * (classes + 1) + torch.eye(classes, dtype=torch.int64)
