"""Remap the clone's classes with a few labeled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from divqat._util.errors import require
from divqat._util.settings import option
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.controlled import Controlled
from divqat.metrics import predict

MAPS = ("permutation", "any")
NEVER = -1e9  # logit of a class to which no class of the clone is mapped: finite, below any other


@dataclass(frozen=True, kw_only=True)
class Relabel(Controlled):
    """KnockoffNets, then a remapping of the clone's classes that fits labeled images best.

    Ours, against victims that give wrong classes to foreign images: a clone of such answers may
    separate the classes and only confuse their names. Let n_jk be the number of labeled images of
    class k that the trained clone assigns to class j. Class j is mapped to the class m(j) for which

        sum_j n_j,m(j)

    is largest: with ``permutation`` among one-to-one maps (an assignment problem, solved by
    ``scipy.optimize.linear_sum_assignment``), with ``any`` among all maps. Of equal maps the one
    that changes the fewest classes is taken. The result is a :class:`Relabeled`, and so are the
    clones that ``watch`` gets after each epoch.

    Args:
        map: ``permutation`` or ``any``.

    Raises:
        ImportError: ``permutation`` without SciPy.
        Others: see :class:`LabeledAttack`.
    """

    map: str = option("permutation", "Allowed maps between classes.", choices=MAPS)

    def _extract(self, task: Task) -> Extraction:
        labeled = self._labeled(task)
        if not self.victim:
            return self._alone(task)
        solve = class_map_solver(self.map)  # a missing SciPy must fail before the first query

        def relabeled(clone: nn.Module) -> nn.Module:
            predicted = predict(clone, labeled.images).argmax(1)
            counts = torch.zeros(task.classes, task.classes, dtype=torch.int64)
            ones = torch.ones_like(predicted)
            counts.index_put_((predicted, labeled.labels.cpu()), ones, accumulate=True)
            return Relabeled(clone, solve(counts).to(task.device)).eval()

        watched = replace(task, watch=lambda clone, count: task.watch(relabeled(clone), count))
        extraction = super()._extract(watched)
        return replace(extraction, clone=relabeled(extraction.clone))


class Relabeled(nn.Module):
    """A classifier whose class j is mapped to class ``meaning[j]``.

    If several classes are mapped to one, its probability is the sum of theirs: its logit is the
    log-sum-exp of their logits. A class to which none is mapped gets the logit ``NEVER``.

    Args:
        clone: from images to logits [N, num_classes].
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
        # g_k = max_j z_j + log sum_j exp(z_j - max) over the j mapped to k: exact for a single j
        top = torch.full_like(logits, NEVER).scatter_reduce(1, index, logits, "amax")
        parts = (logits - top.gather(1, index)).exp()
        sums = torch.zeros_like(logits).scatter_add(1, index, parts)
        return top + sums.clamp(min=1).log()  # a sum below 1 is 0: no j is mapped to k


def class_map_solver(maps: str) -> Callable[[Tensor], Tensor]:
    """A function from counts n_jk (int64 [C, C]: images of class k that are assigned to class j) to
    the class m(j) to which each class j is mapped, int64 [C].

    Args:
        maps: the allowed maps, ``permutation`` or ``any``, see :class:`Relabel`.

    Raises:
        ImportError: ``permutation`` without SciPy.
    """
    if maps == "any":
        return lambda counts: _preferring_itself(counts).argmax(1)
    assign = require("scipy.optimize", "data").linear_sum_assignment
    return lambda counts: torch.from_numpy(assign(_preferring_itself(counts).numpy(), True)[1])


def _preferring_itself(counts: Tensor) -> Tensor:  # int64 [C, C] -> like counts
    """Scaled counts with a tie-break in favor of maps that change fewer classes."""
    classes = len(counts)
    return counts * (classes + 1) + torch.eye(classes, dtype=torch.int64)
