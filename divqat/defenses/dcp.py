"""The defense of Khaled et al., ICMLA 2023: reverse sigmoid where the victim is not sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from divqat._util.settings import option
from divqat.defenses.defense import Defense
from divqat.defenses.reverse_sigmoid import reverse_sigmoid
from divqat.victim.answers import distributions


@dataclass(frozen=True, kw_only=True)
class DCP(Defense):
    """Perturb the answers whose largest probability s is below ``beta``.

        a = 1 / (1 + exp(nu (s - beta))),    y'_k  ~  y_k - a r_k

    with r the clamped reverse sigmoid, see
    :class:`~divqat.defenses.reverse_sigmoid.ClampedReverseSigmoid`. ``beta`` is its amplitude and
    the threshold at once. Khaled, Dhaouadi, Gohring de Magalhães, Nicolescu: "Efficient Defense
    Against Model Stealing Attacks on Convolutional Neural Networks", ICMLA 2023 (arXiv 2309.01838).
    nu and gamma as in their code, which has gamma 0.1 on CIFAR-100 and 0.2 elsewhere; beta is what
    they vary. What of the odds is clamped, and that one number serves twice, is known from that
    code. The most probable class never changes if s > 1/2 and beta, gamma are at most 1; it can
    otherwise.

    Args:
        beta: threshold and amplitude; above 1 every answer is perturbed.
        gamma: how fast the perturbation saturates.
        nu: steepness of the gate.
    """

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = "beta"

    beta: float = option(0.9, "Answers less confident than this change, by so much.", least=0)
    gamma: float = option(0.2, "How fast the perturbation saturates.", above=0)
    nu: float = option(1000.0, "Steepness of the gate.", above=0)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        top = probs.amax(1, keepdim=True)  # [N, 1]
        # a = sigmoid(nu (beta - s)), which cannot overflow
        gate = (self.nu * (self.beta - top)).sigmoid()  # [N, 1]
        perturbation = reverse_sigmoid(probs, self.beta, self.gamma, clamped=True)
        return distributions(probs - gate * perturbation)
