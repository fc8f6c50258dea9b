"""Attacks with labeled images that also run without the victim: each is its own control."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from divqat._util.settings import option
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.labeled import LabeledAttack
from divqat.attacks.labeled_only import LabeledOnly
from divqat.data.batches import augment
from divqat.data.sets import ImageSet

SHARED = ("seed", "pad", "flip", "momentum", "weight_decay", "precision")


@dataclass(frozen=True, kw_only=True)
class Controlled(LabeledAttack, KnockoffNets):
    """KnockoffNets with labeled images, and its control.

    With ``victim=false`` it has the same labels, the same query set and the same clone, but asks
    nothing; the gain over it is what the victim adds. An attack that learns from the query set
    through the answers alone then learns the labels like :class:`LabeledOnly`.

    Args:
        victim: whether it asks the victim.

    Raises:
        See :class:`LabeledAttack`.
    """

    victim: bool = option(True, "false: the control, which never asks the victim.")

    def _alone(self, task: Task, **settings: object) -> Extraction:
        """The control: a training on the labels, with ``settings`` of :class:`LabeledOnly`."""
        shared = {name: getattr(self, name) for name in SHARED}
        alone = LabeledOnly.from_dict({**shared, **settings}).owning(self._labeled(task))
        return alone._extract(task)


@dataclass(frozen=True, kw_only=True)
class SemiSupervised(Controlled):
    """An attack that learns from answers, from labels, and from the query set as it is.

    Its control takes the same steps on the same images; only the loss of the answers is 0.
    """

    def _extract(self, task: Task) -> Extraction:
        extraction = super()._extract(task)
        if self.victim:
            return extraction
        nothing = task.query_set[:0], torch.empty(0, task.classes)
        return replace(extraction, transfer_set=nothing, queries=0)

    def _ask(self, task: Task, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.victim:
            return super()._ask(task, rows)
        return task.query_set[rows], torch.zeros(len(rows), task.classes)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        # Targets of 0 have a cross-entropy of 0, and no gradient.
        return super()._targets(task, images, answers) if self.victim else (images, answers)


class Draws:
    """Random images for the terms of a loss, with replacement. The random numbers are those of
    torch's global CPU generator, which is seeded in every epoch.

    Args:
        task: its device is that of the batches.
        images: to draw from.
    """

    def __init__(self, task: Task, images: ImageSet) -> None:
        self.images = images.to(task.device)

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        """Images, uint8 [count, C, H, W], and their labels, int64 [count]; none if there are none
        to draw from."""
        size = len(self.images)
        rows = torch.randint(size, (count,)) if size else torch.empty(0, dtype=torch.int64)
        drawn = self.images.subset(rows.to(self.images.images.device))
        return drawn.images, drawn.labels


def without_labels(images: Tensor) -> ImageSet:
    """Images uint8 [N, C, H, W] whose labels are 0."""
    return ImageSet(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))


def shifted(images: Tensor, pad: int, flip: bool) -> Tensor:
    """:func:`divqat.data.augment` with torch's global CPU generator."""
    return augment(images, torch.default_generator, pad=pad, flip=flip)
