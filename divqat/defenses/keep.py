"""Release less: the label, the largest probabilities, or few decimals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from divqat._util.settings import option
from divqat.defenses.defense import Defense
from divqat.victim.answers import distributions, keep_top, label_only


@dataclass(frozen=True, kw_only=True)
class LabelOnly(Defense):
    """The most probable class as a one-hot row; ties go to the lower index.

    No defense that keeps the label can release less, so this is the baseline of such defenses
    (Tramèr, Zhang, Juels, Reiter, Ristenpart, "Stealing Machine Learning Models via Prediction
    APIs", USENIX Security 2016, section 6). The same as ``Victim(answer="label")``, except that the
    latter breaks ties between float32 probabilities by the logits.
    """

    keeps_top1: ClassVar[bool] = True
    strength: ClassVar[str | None] = None

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        return label_only(probs)


@dataclass(frozen=True, kw_only=True)
class TopK(Defense):
    """The ``k`` largest probabilities, scaled to sum 1; the other classes get 0.

    ``Victim(answer="topk")`` does not scale them, and so reveals the missing mass. Ties go to the
    lower class index.

    Raises:
        ValueError: (at a call) there are fewer classes than ``k``.
    """

    keeps_top1: ClassVar[bool] = True
    strength: ClassVar[str | None] = None

    k: int = option(3, "Number of classes that keep their probability.", least=1)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        return distributions(keep_top(probs, self.k))


@dataclass(frozen=True, kw_only=True)
class Rounding(Defense):
    """All probabilities rounded to ``decimals`` places, then scaled to sum 1 (Tramèr et al. 2016,
    section 6).

    A row that rounds to zeros becomes uniform. ``Victim(answer="rounded")`` does not scale.
    Different probabilities may become ties, so that the label can change.
    """

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = None

    # float32 has hardly more than 7 digits.
    decimals: int = option(1, "Number of decimal places.", least=0, most=7)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        return distributions(probs.round(decimals=self.decimals))
