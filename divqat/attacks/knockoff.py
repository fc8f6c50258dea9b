"""KnockoffNets with the random strategy (Orekondy, Schiele, Fritz, CVPR 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from divqat._util.settings import option
from divqat.attacks.answers import READINGS, reading
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.training import Loss, Training, TransferAttack, soft_cross_entropy


@dataclass(frozen=True, kw_only=True)
class KnockoffNets(TransferAttack):
    """Query each of ``query_budget`` random images once, and train a clone on the answers.

    The clone minimizes -sum_k t_k log softmax(f(x))_k, averaged over the transfer set, where the
    target ``t`` is the victim's answer after ``reading``: one formula for probabilities, labels
    (one-hot rows), top-k and rounded answers. ``pad`` and ``flip`` change the images, not their
    targets. The paper's code trains for 100 epochs with lr 0.01 and momentum 0.5.

    Args:
        query_budget: images drawn from the query set without replacement; None: all of them.
        reading: how an answer becomes a target, see :func:`divqat.attacks.answers.reading`.
    """

    reading: str = option("as_given", f"How an answer becomes the clone's target: {READINGS}.")

    def __post_init__(self) -> None:
        super().__post_init__()
        reading(self.reading)

    def _extract(self, task: Task) -> Extraction:
        generator = torch.Generator().manual_seed(self.seed)
        rows = self._draw(task, generator)
        *seeds, loss_seed = torch.randint(2**62, (self.epochs + 1,), generator=generator).tolist()
        torch.manual_seed(loss_seed)  # for the initial weights of a loss that trains
        loss = self._loss(task)
        training = Training(self, task, seeds, head=loss if isinstance(loss, nn.Module) else None)
        asked, answers = self._ask(task, rows)
        images, targets = self._targets(task, asked, answers)
        clone = training.run(images, targets, loss)
        return Extraction(clone, (asked, answers), len(answers))

    def check(self, images: int) -> None:
        if self.query_budget is not None and self.query_budget > images:
            raise ValueError(
                f"query_budget: wanted 1 to {images}, the size of the query set, got "
                f"{self.query_budget}"
            )

    def _draw(self, task: Task, generator: torch.Generator) -> Tensor:
        """The rows of the query set to query, in order."""
        return torch.randperm(len(task.query_set), generator=generator)[: self.query_budget]

    def _ask(self, task: Task, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queried images, uint8 [Q, C, H, W], and the answers, float32 [Q, num_classes]."""
        images = task.query_set[rows]
        return images, task.ask(images)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Training data: images uint8 [M, C, H, W] and targets [M, num_classes], rows of sum 1."""
        return images, reading(self.reading)(answers)

    def _loss(self, task: Task) -> Loss:
        """The loss of the clone. A loss that is a module trains together with the clone."""
        return soft_cross_entropy
