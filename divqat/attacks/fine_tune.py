"""Train a clone on the answers, then on a few labeled images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from divqat._util.settings import option
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.labeled import LabeledAttack, learn_labels


@dataclass(frozen=True, kw_only=True)
class FineTune(LabeledAttack, KnockoffNets):
    """KnockoffNets whose clone is then trained on with all its weights on labeled images.

    Ours, against victims that answer images unlike their own with wrong classes: what the clone
    has learned to see is of use even where the names are wrong. Both trainings are those of
    :class:`TransferAttack`, with ``pad`` and ``flip``, momentum, L2 penalty and precision alike;
    the second begins with an optimizer and a cosine of its own. ``watch`` counts its epochs on from
    those of the first. The yardstick is :class:`divqat.attacks.LabeledOnly`.

    Args:
        tune_epochs, tune_lr, tune_batch_size: of the second training.

    Raises:
        See :class:`LabeledAttack`.
    """

    tune_epochs: int = option(60, "Passes over the labeled images.", least=1)
    tune_lr: float = option(0.01, "First learning rate on the labeled images.", above=0)
    tune_batch_size: int = option(50, "Labeled images per step.", least=1)

    def _extract(self, task: Task) -> Extraction:
        labeled = self._labeled(task)
        found = super()._extract(task)
        tuning = replace(
            self, epochs=self.tune_epochs, lr=self.tune_lr, batch_size=self.tune_batch_size
        )
        after = replace(task, watch=lambda clone, count: task.watch(clone, self.epochs + count))
        try:
            clone = learn_labels(tuning, after, labeled, "tuned.pt")
        except FloatingPointError as error:  # it names the lr of a training, which is here another
            raise FloatingPointError(f"fine-tuning, whose lr is tune_lr: {error}") from error
        return replace(found, clone=clone)
