"""What attacks share that undo a defense they know: from released answers back to clean ones.

After the code published with ModelGuard (Tang et al., "ModelGuard: Information-Theoretic Defense
Against Model Extraction Attacks", USENIX Security 2024; github.com/Yoruko-Tang/ModelGuard). That
centres the prior on the *clean* answers to the transfer set, which no attacker has. Here it is
drawn from what the attacker does have, the released ones, so these attacks are weaker than there.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from divqat._util.progress import progress
from divqat._util.settings import option
from divqat.attacks.answers import distributions, reading
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.data.batches import to_float
from divqat.victim import Defense, Victim, defense_text

R = TypeVar("R", bound="Recovery")
ROWS = 4096  # answered or perturbed at once


@dataclass(frozen=True, kw_only=True)
class Recovery(KnockoffNets):
    """KnockoffNets whose clone learns estimates of the clean answers, see :meth:`against`.

    The attacker imitates the victim: it makes up clean answers y, releases them as the victim
    would, and learns from the pairs (y, y') to get from y' back to y. That costs no query.

    Args:
        pairs: most pairs (y, y'). Each costs a call of the defense; slow ones want fewer.
        reading: what the clone learns of the *recovered* answers.

    Raises:
        RuntimeError: the attack knows no defense.
    """

    pairs: int = option(1_000_000, "Pairs of clean and released answers to make.", least=1)

    def against(self: R, defense: Defense | None) -> R:
        """A copy of the attack that knows how the victim gets from clean to released answers.

        Args:
            defense: from probabilities float32 [N, num_classes] and the images float32
                [N, C, H, W] in [-1, 1] that were asked, both on the CPU, to what is released. A
                fitted :class:`divqat.defenses.Defense` is the strongest knowledge: settings and
                networks. A victim that shows less than it (labels, top-k) wants a function that
                does the same. It is copied: the attack leaves no trace in the victim's. Its text,
                or name if it is a plain function, tells runs apart in ``resume_dir``. None: there
                is none, and the answers are taken as they are.
        """
        attack = copy.copy(self)
        # No field: it is no setting that a file or a command line could name.
        object.__setattr__(attack, "_defense", copy.deepcopy(defense))
        return attack

    def _extract(self, task: Task) -> Extraction:
        if not hasattr(self, "_defense"):
            name = type(self).__name__
            raise RuntimeError(
                f"{name} has to know the defense: call {name}(...).against(defense)(victim, ...)"
            )
        return super()._extract(task)

    def _known(self) -> Defense | None:
        return getattr(self, "_defense", None)

    def _identity(self, victim: Victim, query_set: Tensor, clone: nn.Module) -> dict[str, object]:
        known = self._known()
        against = "None" if known is None else defense_text(known)
        return {**super()._identity(victim, query_set, clone), "against": against}

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        if self._known() is None:
            return super()._targets(task, images, answers)
        stored = task.folder.load("recovered.pt")
        if stored is None:
            torch.manual_seed(self.seed)
            stored = {"answers": self._recover(task, images, answers)}
            task.folder.save("recovered.pt", stored)
        return images, reading(self.reading)(stored["answers"])

    @abstractmethod
    def _recover(self, task: Task, images: Tensor, answers: Tensor) -> Tensor:
        """Estimates of the clean answers, float32 [N, num_classes] on the CPU.

        Args:
            task: the task.
            images: uint8 [N, C, H, W], what was asked.
            answers: float32 [N, num_classes], what was released.
        """

    def _release(self, probs: Tensor, images: Tensor, rows: Tensor, answers: Tensor) -> Tensor:
        """What the victim would release of ``probs`` [M, num_classes], had they been its answers to
        ``images[rows]`` after it released ``answers`` for ``images``."""
        # A copy again: what a defense remembers of one run must not change the next.
        defense = copy.deepcopy(self._known())
        assert defense is not None
        if getattr(defense, "remembers", False):
            # It remembers what it released, and that the attacker has seen.
            for y, asked in zip(answers.split(ROWS), images.split(ROWS), strict=True):
                defense(y, to_float(asked))
        chunks = list(zip(probs.split(ROWS), rows.split(ROWS), strict=True))
        released = torch.cat(
            [defense(y, to_float(images[i])) for y, i in progress(chunks, "defense", unit="chunk")]
        )
        if released.shape != probs.shape or not released.isfinite().all():
            raise ValueError(
                f"against: {defense} wanted finite {list(probs.shape)}, got "
                f"{list(released.shape)} with {int((~released.isfinite()).sum())} not finite"
            )
        return released

    def _dirichlet(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Clean answers as they may be, and for each the row of ``answers`` that it belongs to.

        One half is drawn near the released answers, the other from the source's prior for those who
        have none: near the corners, where trained networks answer and where the first half has
        nothing when the defense flattens answers.
        """
        classes, half = answers.shape[1], self.pairs // 2
        rows = torch.cat([torch.arange(half), torch.arange(self.pairs - half)]) % len(answers)
        # y ~ Dirichlet(8 C ŷ), ŷ the released answer; Dirichlet(0) does not exist
        near = (8 * classes * distributions(answers)[rows[:half]]).clamp(min=1e-3)
        # y ~ Dirichlet(1 / C, ..., 1 / C)
        corners = torch.full((self.pairs - half, classes), 1 / classes)
        return torch.distributions.Dirichlet(torch.cat([near, corners])).sample(), rows
