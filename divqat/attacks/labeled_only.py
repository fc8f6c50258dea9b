"""The baseline of attacks that own labeled images: a clone that never queries the victim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from divqat._util.settings import option
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.labeled import LabeledAttack, learn_labels
from divqat.attacks.training import TransferAttack


@dataclass(frozen=True, kw_only=True)
class LabeledOnly(LabeledAttack, TransferAttack):
    """Train the clone on the labeled images alone, without a query.

    The gain of another attack over this one is what it stole from the victim. The transfer set of
    its :class:`Extraction` is empty.

    Args:
        query_budget: has no effect.
        epochs, batch_size, lr: of the training on the labeled images.

    Raises:
        See :class:`LabeledAttack`.
    """

    asks: ClassVar[bool] = False

    epochs: int = option(60, "Passes over the labeled images.", least=1)
    batch_size: int = option(50, "Labeled images per step.", least=1)
    lr: float = option(0.05, "Initial learning rate.", above=0)

    def _extract(self, task: Task) -> Extraction:
        clone = learn_labels(self, task, self._labeled(task))
        return Extraction(clone, (task.query_set[:0], torch.empty(0, task.classes)), 0)
