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
    """Ask once about each of ``query_budget`` random images and train a clone on the answers.

    The clone minimizes -sum_k t_k log softmax(f(x))_k, the mean over the transfer set, where ``t``
    is the victim's answer as ``reading`` takes it: one formula for probabilities, labels (one-hot
    rows), top-k and rounded answers. With ``pad`` and ``flip`` the answers stay those to the
    unchanged image. The paper's code trains 100 epochs with lr 0.01, momentum 0.5.

    Args:
        query_budget: images drawn from the query set without replacement; None: all of them.
        reading: what the attacker makes of an answer, see :func:`divqat.attacks.answers.reading`.
    """

    reading: str = option("as_given", f"What the clone learns of an answer: {READINGS}.")

    def __post_init__(self) -> None:
        super().__post_init__()
        reading(self.reading)

    def _extract(self, task: Task) -> Extraction:
        generator = torch.Generator().manual_seed(self.seed)
        rows = self._draw(task, generator)
        *seeds, own = torch.randint(2**62, (self.epochs + 1,), generator=generator).tolist()
        torch.manual_seed(own)  # the initial weights of what the loss trains
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
        """Which rows of the query set are asked, in order."""
        return torch.randperm(len(task.query_set), generator=generator)[: self.query_budget]

    def _ask(self, task: Task, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is asked, uint8 [Q, C, H, W], and the answers, float32 [Q, num_classes]."""
        images = task.query_set[rows]
        return images, task.ask(images)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """What the clone learns: images uint8 [M, C, H, W] and rows [M, num_classes] of sum 1."""
        return images, reading(self.reading)(answers)

    def _loss(self, task: Task) -> Loss:
        """How it learns it. A loss that is a module trains with the clone."""
        return soft_cross_entropy
