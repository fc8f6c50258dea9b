"""The common part of attacks that know the defense and recover clean answers from released ones.

After the code published with ModelGuard (Tang et al., "ModelGuard: Information-Theoretic Defense
Against Model Extraction Attacks", USENIX Security 2024; github.com/Yoruko-Tang/ModelGuard). That
code centers the prior on the *clean* answers to the transfer set, which no attacker has. Here the
prior is drawn from the released answers, so these attacks are weaker than the published ones.
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
ROWS = 4096  # batch size of a call of the defense


@dataclass(frozen=True, kw_only=True)
class Recovery(KnockoffNets):
    """KnockoffNets whose clone learns estimates of the clean answers, see :meth:`against`.

    The attacker simulates the victim: it generates clean answers y, passes them through the
    defense, and learns from the pairs (y, y') how to recover y from y'. That costs no query.

    Args:
        pairs: maximum number of pairs (y, y'). Each costs a call of the defense; use fewer for a
            slow one.
        reading: how a *recovered* answer becomes the clone's target.

    Raises:
        RuntimeError: :meth:`against` was not called.
    """

    pairs: int = option(1_000_000, "Pairs of clean and released answers to make.", least=1)

    def against(self: R, defense: Defense | None) -> R:
        """A copy of the attack that knows the victim's defense.

        Args:
            defense: a function from probabilities float32 [N, num_classes] and the queried images
                float32 [N, C, H, W] in [-1, 1], both on the CPU, to released answers. A fitted
                :class:`divqat.defenses.Defense` is the strongest knowledge: settings and networks.
                For a victim that releases less (labels, top-k) pass a function that does the same.
                It is copied, so that the attack does not change the victim's defense. Its text, or
                the name of a plain function, is part of the identity of a ``resume_dir``. None: the
                victim has no defense, and the answers are used unchanged.
        """
        attack = copy.copy(self)
        # Not a field: fields are settings of files and command lines.
        object.__setattr__(attack, "_defense", copy.deepcopy(defense))
        return attack

    def _extract(self, task: Task) -> Extraction:
        if not hasattr(self, "_defense"):
            name = type(self).__name__
            raise RuntimeError(
                f"{name} needs to know the defense: call {name}(...).against(defense)(victim, ...)"
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
            images: the queries, uint8 [N, C, H, W].
            answers: the released answers, float32 [N, num_classes].
        """

    def _release(self, probs: Tensor, images: Tensor, rows: Tensor, answers: Tensor) -> Tensor:
        """The answers that the victim would release for clean answers ``probs`` [M, num_classes] to
        ``images[rows]``, after it released ``answers`` for ``images``."""
        # Another copy: a defense that remembers queries must not carry them into the next run.
        defense = copy.deepcopy(self._known())
        assert defense is not None
        if getattr(defense, "remembers", False):
            # Replay the queries, so that the copy remembers the same as the victim's defense.
            for y, queried in zip(answers.split(ROWS), images.split(ROWS), strict=True):
                defense(y, to_float(queried))
        chunks = list(zip(probs.split(ROWS), rows.split(ROWS), strict=True))
        released = torch.cat(
            [defense(y, to_float(images[i])) for y, i in progress(chunks, "defense", unit="chunk")]
        )
        if released.shape != probs.shape or not released.isfinite().all():
            raise ValueError(
                f"against: wanted finite {list(probs.shape)} from {defense}, got "
                f"{list(released.shape)} with {int((~released.isfinite()).sum())} not finite"
            )
        return released

    def _dirichlet(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Plausible clean answers, and for each the row of ``answers`` that it belongs to.

        One half is drawn near the released answers, the other from the source's uninformed prior:
        near the corners of the simplex, where the answers of trained networks lie, and where the
        first half has no samples if the defense flattens answers.
        """
        classes, half = answers.shape[1], self.pairs // 2
        rows = torch.cat([torch.arange(half), torch.arange(self.pairs - half)]) % len(answers)
        # y ~ Dirichlet(8 C ŷ), ŷ the released answer; Dirichlet(0) does not exist
        near = (8 * classes * distributions(answers)[rows[:half]]).clamp(min=1e-3)
        # y ~ Dirichlet(1 / C, ..., 1 / C)
        corners = torch.full((self.pairs - half, classes), 1 / classes)
        return torch.distributions.Dirichlet(torch.cat([near, corners])).sample(), rows
