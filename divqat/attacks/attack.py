"""What all attacks share: how they are called, what they own, what they end with."""

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

# Answers are stored after this many: what a killed run has to ask again at most.
QUERIES_PER_SAVE = 4096
# Called with the clone, in eval mode, and a count from 1 whenever the clone is a result: after each
# epoch over a transfer set, after each round of the attacks that have rounds. It sees, it does not
# steer. A run that goes on after an interruption may say the last count again.
Watch = Callable[[nn.Module, int], object]


@dataclass(frozen=True, eq=False)
class Extraction:
    """What an attack ends with."""

    clone: nn.Module  # after the last epoch, in eval mode
    transfer_set: tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], answers float32 [N, classes]
    queries: int  # images answered for this attack, those before an interruption included


@dataclass(frozen=True, eq=False)
class Task:
    """One call of an attack: what it works on. The clone is the attack's own copy."""

    victim: Victim
    query_set: Tensor  # uint8 [N, C, H, W]
    clone: nn.Module
    classes: int  # of the clone
    folder: Folder
    watch: Watch

    @property
    def device(self) -> torch.device:
        """Where the clone trains."""
        return next(self.clone.parameters()).device

    def ask(self, images: Tensor, name: str = "transfer.pt") -> Tensor:
        """The victim's answers to uint8 ``images``, float32 [N, classes] on the CPU.

        They are kept under ``name``: what is there already is not asked again.

        Raises:
            QueryBudgetExceeded: before the first query, when the victim's budget is too small.
            ValueError: the victim has other classes than the clone, or what is kept are answers to
                other images, as with other threads or hardware an attack can choose others.
        """
        of = identity(images)
        parts = self._stored(name, of)
        left = images[sum(map(len, parts)) :]
        self.afford(len(left))
        chunks = left.split(QUERIES_PER_SAVE) if len(left) else ()
        for chunk in progress(chunks, "queries", total=len(chunks), unit="chunk"):
            parts.append(self.query(to_float(chunk)))
            self.folder.save(name, {"answers": torch.cat(parts), "of": of})
        return torch.cat(parts)

    def query(self, images: Tensor) -> Tensor:
        """The victim's answers to float ``images``, float32 [N, classes] on the CPU; not kept.

        Raises:
            ValueError: the victim has other classes than the clone.
        """
        answers = self.victim(images)
        if answers.shape[1] != self.classes:
            raise ValueError(
                f"clone: wanted {answers.shape[1]} classes like the victim, got {self.classes}"
            )
        return answers

    def asked(self, name: str) -> int:
        """How many answers are kept under ``name``."""
        return sum(map(len, self._stored(name)))

    def afford(self, queries: int) -> None:
        """See that the victim allows so many more.

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
                f"resume_dir: {self.folder.within(name)} has answers to other images; go on with "
                "as many threads and the hardware that it was begun with, or in another folder"
            )
        return [] if stored is None else [stored["answers"]]


@dataclass(frozen=True, kw_only=True)
class Attack(StepSettings, ABC):
    """An attack is its settings: ``attack(victim, query_set, clone)`` runs it.

    Every attack trains its clone by SGD with momentum. The clone of the last step is the result,
    not the best one: choosing would need test data.

    Raises:
        ConfigError: (a ValueError) an argument of a wrong type or out of its range.
    """

    #: Whether it asks the victim at all: one that does not shows what a thief has without it.
    asks: ClassVar[bool] = True

    query_budget: int | None = option(
        None, "Images asked about at most; None: what the attack has by default.", least=1
    )
    seed: int = option(0, "Everything random follows from it.", least=0)

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
            query_set: images the attacker owns, of the size that victim and clone take.
            clone: initial weights and architecture; it is copied and stays as it was. The copy
                trains on the device of ``clone``.
            resume_dir: keeps answers and the clone of every epoch or round. A run that was killed
                goes on from there, ends with the same bits as one that was not (unless a defense
                of the victim remembers queries, and has forgotten them), and asks nothing twice.
                One folder belongs to one victim.
            watch: called with the clone and a count from 1 after every epoch or round.

        Raises:
            QueryBudgetExceeded: before the first query, when the victim's budget is too small.
            TypeError, ValueError: wrong kind of argument, a budget larger than the query set, a
                clone with other classes than the victim, a ``resume_dir`` of other settings.
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
            memory_format=torch.channels_last  # the faster one for convolutions
        )
        classes = _classes(clone, query_set[:1])  # a clone that does not fit must cost no query
        folder = Folder(resume_dir, self._identity(victim, query_set, clone))
        task = Task(victim, query_set, clone, classes, folder, watch)
        device = task.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._extract(task)

    def check(self, images: int) -> None:
        """See that a query set of so many images is enough for the settings.

        Raises:
            ValueError: it is not.
        """

    @property
    def owns(self) -> bool:
        """Whether it wants images of the victim's kind, see ``owning`` where there is one."""
        return False

    @abstractmethod
    def _extract(self, task: Task) -> Extraction:
        """The attack itself. It may seed torch's global generators: the caller restores them."""

    def _identity(self, victim: Victim, query_set: Tensor, clone: nn.Module) -> dict[str, object]:
        """What a folder belongs to."""
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
