"""The interface of all post-hoc defenses."""

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
    """The resources of the victim's owner, for fitting a defense."""

    train: LabeledImages  # the victim's training set
    model: Any  # the victim itself, in any form that divqat.metrics.predict takes
    build: Callable[[], nn.Module]  # creates a network with the victim's inputs and classes
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Defense(Options, ABC):
    """The settings of a defense; use it as ``Victim(model, defense=defense.fit(owner))``.

    ``str(defense)`` lists the settings, so that results and resumed attacks can distinguish
    defenses.

    Raises:
        ConfigError: (a ValueError) a setting has a wrong type or is out of its range.
    """

    #: Name of the setting with which the L1 distance to the clean answers grows, or None.
    strength: ClassVar[str | None]
    #: The value of that setting at which answers do not change.
    neutral: ClassVar[float] = 0.0
    #: Whether answers depend on earlier queries.
    remembers: ClassVar[bool] = False

    @property
    @abstractmethod
    def keeps_top1(self) -> bool:
        """Whether the most probable class never changes, except for ties. A class variable if it
        does not depend on the settings."""

    def fit(self: D, owner: Owner) -> D:
        """A copy that is ready to use: with trained networks and without remembered queries."""
        return copy.deepcopy(self)

    @abstractmethod
    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        """The released answers.

        Args:
            probs: clean answers, float32 [N, num_classes], rows of sum 1, on the CPU.
            images: the queries, float32 [N, C, H, W] in [-1, 1], on the CPU.

        Returns:
            float32 [N, num_classes], non-negative, rows of sum 1.

        Raises:
            RuntimeError: the defense has to be fitted first.
        """
