"""The interface of all attacks: settings, call, result."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from divqat._util.progress import progress
from divqat._util.settings import option
from divqat.attacks.clone_settings import StepSettings
from divqat.attacks.folder import Folder
from divqat.data.batches import to_float
from divqat.victim import QueryBudgetExceeded, Victim

# Answers are stored after this many queries: a killed run repeats at most these.
QUERIES_PER_SAVE = 4096
# A callback that gets the clone, in eval mode, and a count from 1: after each epoch over a transfer
# set, or after each round of the attacks that have rounds. It must not change the clone. A resumed
# run may repeat the last count.
Watch = Callable[[nn.Module, int], object]


@dataclass(frozen=True, eq=False)
class Extraction:
    """The result of an attack."""

    clone: nn.Module  # after the last epoch, in eval mode
    transfer_set: tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], answers float32 [N, classes]
    queries: int  # images answered for this attack, including those before an interruption


@dataclass(frozen=True, eq=False)
class Task:
    """The inputs of one call of an attack. The clone is the attack's own copy."""

    victim: Victim
    query_set: Tensor  # uint8 [N, C, H, W]
    clone: nn.Module
    classes: int  # of the clone
    folder: Folder
    watch: Watch

    @property
    def device(self) -> torch.device:
        """The device on which the clone trains."""
        return next(self.clone.parameters()).device

    def ask(self, images: Tensor, name: str = "transfer.pt") -> Tensor:
        """The victim's answers to uint8 ``images``, float32 [N, classes] on the CPU.

        They are stored under ``name``; stored answers cost no second query.

        Raises:
            QueryBudgetExceeded: before the first query, if the victim's budget is too small.
            ValueError: victim and clone differ in their number of classes, or the stored answers
                belong to other images (with another number of threads or other hardware an attack
                may choose other images).
        """
        of = identity(images)
        parts = self._stored(name, of)
        left = images[sum(map(len, parts)) :]
        self.check_budget(len(left))
        chunks = left.split(QUERIES_PER_SAVE) if len(left) else ()
        for chunk in progress(chunks, "queries", total=len(chunks), unit="chunk"):
            parts.append(self.query(to_float(chunk)))
            self.folder.save(name, {"answers": torch.cat(parts), "of": of})
        return torch.cat(parts)

    def query(self, images: Tensor) -> Tensor:
        """The victim's answers to float ``images``, float32 [N, classes] on the CPU; not stored.

        Raises:
            ValueError: victim and clone differ in their number of classes.
        """
        answers = self.victim(images)
        if answers.shape[1] != self.classes:
            raise ValueError(
                f"clone: wanted {answers.shape[1]} classes like the victim, got {self.classes}"
            )
        return answers

    def stored(self, name: str) -> int:
        """The number of answers stored under ``name``."""
        return sum(map(len, self._stored(name)))

    def check_budget(self, queries: int) -> None:
        """Check that the victim allows this many more queries.

        Raises:
            QueryBudgetExceeded: it does not.
        """
        left = self.victim.remaining
        if left is not None and queries > left:
            raise QueryBudgetExceeded(
                f"the attack needs {queries} queries, the victim allows {left} more"
            )

    def _stored(self, name: str, of: str | None = None) -> list[Tensor]:
        stored = self.folder.load(name)
        if stored is not None and of is not None and stored.get("of") != of:
            raise ValueError(
                f"resume_dir: {self.folder.path_of(name)} has answers to other images; resume with "
                "the same number of threads and the same hardware, or use another folder"
            )
        return [] if stored is None else [stored["answers"]]


@dataclass(frozen=True, kw_only=True)
class Attack(StepSettings, ABC):
    """The settings of an attack; ``attack(victim, query_set, clone)`` runs it.

    Every attack trains its clone by SGD with momentum. The result is the clone of the last step,
    not the best one, as choosing would need test data.

    Raises:
        ConfigError: (a ValueError) an argument has a wrong type or is out of its range.
    """

    #: Whether it queries the victim at all; False for a baseline without the victim.
    asks: ClassVar[bool] = True

    query_budget: int | None = option(
        None, "Maximum number of queried images; None: the default of the attack.", least=1
    )
    seed: int = option(0, "Seed of everything random.", least=0)

    def __call__(
        self,
        victim: Victim,
        query_set: Tensor,  # uint8 [N, C, H, W]
        clone: nn.Module,
        *,
        resume_dir: str | Path | None = None,
        watch: Watch = lambda clone, count: None,
    ) -> Extraction:
        """Run the attack.

        Args:
            victim: the black box.
            query_set: the attacker's images, of the size that victim and clone take.
            clone: architecture and initial weights of the surrogate; it is copied and not changed.
                The copy trains on the device of ``clone``.
            resume_dir: a folder for the answers and the clone of every epoch or round. A killed run
                resumes from it, repeats no query, and ends with the same bits as an uninterrupted
                one (unless a defense of the victim remembers queries, and has forgotten them). Use
                one folder per victim.
            watch: called with the clone and a count from 1 after every epoch or round.

        Raises:
            QueryBudgetExceeded: before the first query, if the victim's budget is too small.
            TypeError: an argument has a wrong type.
            ValueError: ``query_set`` is not uint8 [N, C, H, W], a budget is larger than it, victim
                and clone differ in their number of classes, or ``resume_dir`` belongs to other
                settings.
            FloatingPointError: the clone's loss is no longer finite.
        """
        if not isinstance(victim, Victim):
            raise TypeError(f"victim: wanted a divqat.Victim, got {type(victim).__name__}")
        if query_set.dtype != torch.uint8 or query_set.dim() != 4 or not len(query_set):
            raise ValueError(
                f"query_set: wanted uint8 [N, C, H, W], got {query_set.dtype} "
                f"{list(query_set.shape)}"
            )
        self.check(len(query_set))
        clone = copy.deepcopy(clone).to(  # type: ignore[call-overload]
            memory_format=torch.channels_last  # faster for convolutions
        )
        classes = _classes(clone, query_set[:1])  # a clone that does not fit must fail before this
        folder = Folder(resume_dir, self._identity(victim, query_set, clone))
        task = Task(victim, query_set, clone, classes, folder, watch)
        device = task.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._extract(task)

    def check(self, images: int) -> None:
        """Check that a query set of ``images`` images is large enough for the settings.

        Raises:
            ValueError: it is not.
        """

    @property
    def owns(self) -> bool:
        """Whether it needs labeled images of the victim's kind, see :class:`LabeledAttack`."""
        return False

    @abstractmethod
    def _extract(self, task: Task) -> Extraction:
        """The attack itself. It may seed torch's global generators: the caller restores them."""

    def _identity(self, victim: Victim, query_set: Tensor, clone: nn.Module) -> dict[str, object]:
        """The settings and inputs that a ``resume_dir`` belongs to."""
        shapes = {name: list(value.shape) for name, value in clone.state_dict().items()}
        return {
            "attack": type(self).__name__,
            **self.to_dict(),
            "answer": victim.answer,
            "defense": victim.defense,
            "query_set": identity(query_set),
            "clone": hashlib.sha256(f"{clone} {shapes}".encode()).hexdigest()[:16],
        }


def identity(images: Tensor) -> str:
    """16 hexadecimal digits that identify images by their pixels."""
    return hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()[:16]


def _classes(clone: nn.Module, images: Tensor) -> int:
    clone.eval()
    with torch.no_grad():
        return clone(to_float(images).to(next(clone.parameters()).device)).shape[1]
