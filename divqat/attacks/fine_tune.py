"""Train a clone on the answers, then on a few labeled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from divqat._util.settings import option
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.controlled import Controlled
from divqat.attacks.labeled import learn_labels


@dataclass(frozen=True, kw_only=True)
class FineTune(Controlled):
    """KnockoffNets, then fine-tuning of all weights of the clone on labeled images.

    Ours, against victims that give wrong classes to foreign images: the features that the clone
    has learned are useful even if the classes are wrong. Both trainings are those of
    :class:`TransferAttack`, with the same ``pad``, ``flip``, momentum, L2 penalty and precision;
    the second starts with a new optimizer and a new cosine. ``watch`` continues the count of
    epochs. Its control, ``victim=false``, is the second training alone.

    Args:
        tune_epochs, tune_lr, tune_batch_size: settings of the second training.

    Raises:
        See :class:`LabeledAttack`.
    """

    tune_epochs: int = option(60, "Passes over the labeled images.", least=1)
    tune_lr: float = option(0.01, "Initial learning rate on the labeled images.", above=0)
    tune_batch_size: int = option(50, "Labeled images per step.", least=1)

    def _extract(self, task: Task) -> Extraction:
        labeled = self._labeled(task)
        second: dict[str, Any] = {"epochs": self.tune_epochs, "lr": self.tune_lr}
        second["batch_size"] = self.tune_batch_size
        if not self.victim:
            return self._alone(task, **second)
        extraction = super()._extract(task)
        tuning = replace(self, **second)
        after = replace(task, watch=lambda clone, count: task.watch(clone, self.epochs + count))
        try:
            clone = learn_labels(tuning, after, labeled, "tuned.pt")
        except FloatingPointError as error:  # the message says lr, but here it is tune_lr
            raise FloatingPointError(f"fine-tuning, whose lr is tune_lr: {error}") from error
        return replace(extraction, clone=clone)
