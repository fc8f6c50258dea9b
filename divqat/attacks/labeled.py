"""The common part of attacks that own labeled images of the victim's kind."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat.attacks.attack import Attack, Task
from divqat.attacks.training import Loss, Training, TransferAttack, soft_cross_entropy
from divqat.data.sets import ImageSet
from divqat.victim import Victim

L = TypeVar("L", bound="LabeledAttack")


@dataclass(frozen=True, kw_only=True)
class LabeledAttack(Attack):
    """An attack with a few labeled images of the victim's kind, see :meth:`owning`.

    Raises (both before the first query):
        RuntimeError: it has no such images.
        ValueError: their shape is not that of the query set, or a label exceeds the clone's
            classes.
    """

    @property
    def owns(self) -> bool:
        return True

    def owning(self: L, images: ImageSet) -> L:
        """A copy of the attack that owns ``images``. They cost no query.

        Args:
            images: labeled images in memory, of the shape of the query set. Their content is part
                of the identity of a ``resume_dir``.

        Raises:
            TypeError: ``images`` is not a :class:`divqat.data.ImageSet`.
            ValueError: it is empty.
        """
        if not isinstance(images, ImageSet):
            raise TypeError(f"images: wanted a divqat.data.ImageSet, got {type(images).__name__}")
        if not len(images):
            raise ValueError("images: wanted at least one labeled image, got 0")
        attack = copy.copy(self)
        # Not a field: fields are settings of files and command lines.
        object.__setattr__(attack, "_owned", images)
        return attack

    def _labeled(self, task: Task) -> ImageSet:
        """The labeled images, after a check that they fit the task."""
        images: ImageSet | None = getattr(self, "_owned", None)
        if images is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} needs labeled images: call {name}(...).owning(images)(victim, ...)"
            )
        wanted, got = list(task.query_set.shape[1:]), list(images.image_shape)
        if wanted != got:
            raise ValueError(f"owning: wanted images of {wanted} like the query set, got {got}")
        highest = int(images.labels.max())
        if highest >= task.classes:
            raise ValueError(
                f"owning: wanted labels below {task.classes}, the clone's classes, got {highest}"
            )
        return images

    def _identity(self, victim: Victim, query_set: Tensor, clone: nn.Module) -> dict[str, object]:
        digest = hashlib.sha256()
        owned: ImageSet | None = getattr(self, "_owned", None)
        if owned is not None:
            for part in (owned.images, owned.labels):
                digest.update(part.cpu().numpy().tobytes())
        return {**super()._identity(victim, query_set, clone), "labeled": digest.hexdigest()[:16]}


def learn_labels(
    attack: TransferAttack,
    task: Task,
    labeled: ImageSet,
    name: str = "clone.pt",
    loss: Loss = soft_cross_entropy,
) -> nn.Module:
    """Train the task's clone, from its present weights, on labels instead of answers.

    Args:
        attack: epochs, learning rate and so on.
        task: the clone, and the folder of its checkpoint.
        labeled: the training images.
        name: of the checkpoint.
        loss: of a batch; its targets are the one-hot labels.

    Returns:
        The clone in eval mode.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(attack.seed)
    seeds = torch.randint(2**62, (attack.epochs,), generator=generator).tolist()
    targets = F.one_hot(labeled.labels, task.classes).float()
    return Training(attack, task, seeds, name=name).run(labeled.images, targets, loss)
