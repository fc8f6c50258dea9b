"""Reverse sigmoid (Lee et al., IEEE S&P Workshops 2019), as published and as often implemented."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from divqat._util.settings import option
from divqat.defenses.defense import Defense
from divqat.victim.answers import distributions

LOWEST_ODDS = 1e-12


def reverse_sigmoid(
    probs: Tensor,  # [N, num_classes]
    beta: float,
    gamma: float,
    *,
    clamped: bool,
) -> Tensor:  # [N, num_classes], in [-beta / 2, beta / 2]
    """The perturbation that is subtracted from the probabilities before they are scaled.

    ``clamped`` keeps the odds y / (1 - y) in [1e-12, 1]: then nothing is subtracted from a class
    above 1/2. (The published codes have 1 - 1e-12, which is 1 in float32.)
    """
    log_odds = probs.logit(eps=0)  # eps=0: a probability that rounds to above 1 counts as 1
    if clamped:
        log_odds = log_odds.clamp(math.log(LOWEST_ODDS), 0)
    # r_k = beta [sigmoid(gamma log(y_k / (1 - y_k))) - 1/2]
    return beta * ((gamma * log_odds).sigmoid() - 0.5)


@dataclass(frozen=True, kw_only=True)
class ReverseSigmoid(Defense):
    """Lower the classes above 1/2 and raise those below, so that different logits give similar
    answers.

        y'_k  ~  max(0, y_k - r_k),    r_k = beta [sigmoid(gamma sigmoid^-1(y_k)) - 1/2]

    Lee, Edwards, Molloy, Su: "Defending Against Neural Network Model Stealing Attacks Using
    Deceptive Perturbations", IEEE Security and Privacy Workshops 2019, equations 3 and 4. The
    defaults are those of the comparisons in ModelGuard (Tang et al., USENIX Security 2024: gamma
    0.2, beta 0.2 to 1). y_k - r_k is never negative for beta up to 1. For larger beta the sources
    scale negative numbers; here they count as 0. With beta and gamma up to 1 a class above 1/2
    stays the most probable one, with one exception: for beta = 1 a class of probability 1 ties with
    all others, and the answer is uniform. A class below 1/2 can be overtaken.

    Args:
        beta: amplitude.
        gamma: how fast r saturates; with a small gamma r depends little on y.
    """

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = "beta"

    beta: float = option(1.0, "Amplitude; 0 changes nothing.", least=0)
    gamma: float = option(0.2, "How fast the perturbation saturates.", above=0)

    _clamped: ClassVar[bool] = False

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        perturbation = reverse_sigmoid(probs, self.beta, self.gamma, clamped=self._clamped)
        return distributions(probs - perturbation)


@dataclass(frozen=True, kw_only=True)
class ClampedReverseSigmoid(ReverseSigmoid):
    """:class:`ReverseSigmoid` with the odds clamped to [1e-12, 1], which makes it another defense.

    The published codes of Mazeika, Li, Forsyth, "How to Steer Your Adversary", ICML 2022, and of
    Khaled et al., ICMLA 2023, implement it under the name of the original (gamma 0.1 on CIFAR-10,
    else 0.2). A class above 1/2 has r = 0 and is lowered only by the scaling; the others rise by up
    to beta / 2 each. No entry can become negative. For beta and gamma up to 1 a class with s > 1/2
    stays the most probable one, as with the original.
    """

    _clamped: ClassVar[bool] = True
