"""Show less: the label, the largest probabilities, or few decimals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from divqat._util.settings import option
from divqat.defenses.defense import Defense
from divqat.victim.answers import distributions, keep_top, label_only


@dataclass(frozen=True, kw_only=True)
class LabelOnly(Defense):
    """The most probable class as a one-hot row; of two the lower one.

    No defense that keeps the label shows less, so this is what such a defense has to be compared
    with (Tramèr, Zhang, Juels, Reiter, Ristenpart, "Stealing Machine Learning Models via
    Prediction APIs", USENIX Security 2016, section 6). The same as ``Victim(answer="label")``,
    which breaks ties between float32 probabilities by the logits.
    """

    keeps_top1: ClassVar[bool] = True
    strength: ClassVar[str | None] = None

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        return label_only(probs)


@dataclass(frozen=True, kw_only=True)
class TopK(Defense):
    """The ``k`` largest probabilities, scaled to sum 1; the other classes get 0.

    ``Victim(answer="topk")`` does not scale them, and so tells how much mass is missing.
    Ties go to the lower class index.

    Raises:
        ValueError: when called with fewer classes than ``k``.
    """

    keeps_top1: ClassVar[bool] = True
    strength: ClassVar[str | None] = None

    k: int = option(3, "How many classes keep their probability.", least=1)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        return distributions(keep_top(probs, self.k))


@dataclass(frozen=True, kw_only=True)
class Rounding(Defense):
    """All probabilities to ``decimals`` places, then scaled to sum 1 (Tramèr et al. 2016, sec. 6).

    A row that rounds to nothing but zeros becomes uniform. ``Victim(answer="rounded")`` does not
    scale. Classes that were apart may tie, and whoever reads the label then finds another one.
    """

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = None

    # float32 has hardly more than 7 digits.
    decimals: int = option(1, "Places behind the point.", least=0, most=7)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        return distributions(probs.round(decimals=self.decimals))
