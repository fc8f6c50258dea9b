"""What all post-hoc defenses share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from divqat._util.settings import Options
from divqat.data.sets import LabeledImages

D = TypeVar("D", bound="Defense")


@dataclass(frozen=True, eq=False)
class Owner:
    """What the victim's owner has, to set a defense up with."""

    train: LabeledImages  # what the victim learned
    model: Any  # the victim itself: whatever divqat.evaluate.predict takes
    build: Callable[[], nn.Module]  # a new network with the victim's inputs and classes
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Defense(Options, ABC):
    """A defense is its settings: ``Victim(model, defense=defense.fit(owner))`` wears it.

    Its text (``str``) names the settings, so that results and resumed attacks tell defenses apart.

    Raises:
        ConfigError: (a ValueError) a setting of a wrong type or out of its range.
    """

    #: The setting that the L1 distance to the clean answers grows with; None: there is none.
    strength: ClassVar[str | None]
    #: The value of that setting at which the answers stay clean.
    neutral: ClassVar[float] = 0.0
    #: Whether an answer depends on what was asked before.
    remembers: ClassVar[bool] = False

    @property
    @abstractmethod
    def keeps_top1(self) -> bool:
        """Whether the most probable class never changes, ties aside. A class variable where it
        does not depend on the settings."""

    def fit(self: D, owner: Owner) -> D:
        """A copy that is ready to use: networks trained, no memory of earlier queries."""
        return copy.deepcopy(self)

    @abstractmethod
    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        """What is released in place of the probabilities.

        Args:
            probs: clean answers, float32 [N, num_classes], rows of sum 1, on the CPU.
            images: what was asked, float32 [N, C, H, W] in [-1, 1], on the CPU.

        Returns:
            float32 [N, num_classes], non-negative, rows of sum 1.

        Raises:
            RuntimeError: the defense has to be fitted first.
        """
