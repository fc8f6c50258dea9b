"""Take a known decoy out of the answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from divqat._util.devices import fingerprint
from divqat._util.settings import option
from divqat.attacks.answers import LEAST, centred_logs, distributions, lowest, reading
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.residual import cross_fitted, ridge
from divqat.data.batches import to_float
from divqat.victim import Victim

K = TypeVar("K", bound="KnownDecoy")
WAYS = ("subtract", "drop", "differ")
SAME = 1e-4  # largest difference of probabilities that count as equal
# From float32 images [N, C, H, W] in [-1, 1] to answers [N, num_classes], rows of sum 1.
Targets = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class KnownDecoy(KnockoffNets):
    """KnockoffNets by a thief who knows the victim's decoy t, its seed included.

    Ours. It stands for every way to find the decoy out: a defense that holds against it owes
    nothing to secrecy. ``subtract`` learns c(log y) - B c(log t(x)), c minus its mean over the
    classes and B by ridge regression, of each half of the queries on the other half. ``drop``
    learns the answers that t explains least: those whose cross-entropy -sum t log y is largest.
    ``differ`` learns the answers that differ from t at all: against a victim that rejects foreign
    images (:class:`divqat.nn.RectifiedOutput`), whose t is always the same, all that it gave away.

    Args:
        way: ``subtract``, ``drop`` or ``differ``.
        keep: with ``drop``, this share of the queries, rounded, at least one.
        reading: what the clone learns of the answers that are left.

    Raises:
        RuntimeError: the attack was not given the decoy.
    """

    way: str = option("subtract", "What becomes of the decoy.", choices=WAYS)
    keep: float = option(0.3, "With drop, share of the answers to learn.", above=0, most=1)
    reading: str = option("standardized2", "What the clone learns of what is left.")

    def knowing(self: K, decoy: Targets | None) -> K:
        """A copy of the attack that knows the decoy; None: there is none, and the answers are taken
        as they are."""
        attack = copy.copy(self)
        # No field: it is no setting that a file or a command line could name.
        object.__setattr__(attack, "_decoy", decoy)
        return attack

    def _extract(self, task: Task) -> Extraction:
        if not hasattr(self, "_decoy"):
            name = type(self).__name__
            raise RuntimeError(
                f"{name} has to know the decoy: call {name}(...).knowing(decoy)(victim, ...)"
            )
        return super()._extract(task)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        decoy: Targets | None = getattr(self, "_decoy", None)
        if decoy is None:
            return super()._targets(task, images, answers)
        expected = answers_of(decoy, images)
        if self.way == "subtract":
            torch.manual_seed(self.seed)
            logs, decoys = centred_logs(answers).double(), centred_logs(expected).double()
            left = logs - cross_fitted(ridge, decoys, logs)
            return images, reading(self.reading)(left.softmax(1).float())
        if self.way == "drop":
            explained = (expected * distributions(answers).clamp(min=LEAST).log()).sum(1)
            rows = lowest(explained, self.keep)
        else:
            distance = (distributions(answers) - expected).abs().amax(1)
            # The first one if there is none, as a clone cannot learn from nothing.
            differs = (distance > SAME).nonzero()[:, 0]
            rows = differs if len(differs) else torch.tensor([0])
        return images[rows], reading(self.reading)(answers[rows])

    def _identity(self, victim: Victim, query_set: Tensor, clone: nn.Module) -> dict[str, object]:
        decoy: Targets | None = getattr(self, "_decoy", None)
        known = decoy and fingerprint({"answers": answers_of(decoy, query_set[:256])})
        return {**super()._identity(victim, query_set, clone), "decoy": known}


@torch.no_grad()
def answers_of(decoy: Targets, images: Tensor) -> Tensor:
    """t of uint8 images [N, C, H, W], float32 [N, num_classes] on the CPU."""
    return torch.cat([decoy(to_float(part)).float().cpu() for part in images.split(4096)])
