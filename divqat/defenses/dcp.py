"""The defense of Khaled et al., ICMLA 2023: reverse sigmoid on unconfident answers."""

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
    :class:`~divqat.defenses.reverse_sigmoid.ClampedReverseSigmoid`. ``beta`` is both its amplitude
    and the threshold. Khaled, Dhaouadi, Gohring de Magalhães, Nicolescu: "Efficient Defense Against
    Model Stealing Attacks on Convolutional Neural Networks", ICMLA 2023 (arXiv 2309.01838). nu and
    gamma are those of their code, which has gamma 0.1 on CIFAR-100 and 0.2 elsewhere; they vary
    beta. The clamping of the odds and the double role of beta come from that code. If s > 1/2 and
    beta and gamma are at most 1, the most probable class never changes; otherwise it can.

    Args:
        beta: threshold and amplitude; above 1 every answer is perturbed.
        gamma: how fast the perturbation saturates.
        nu: steepness of the gate.
    """

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = "beta"

    beta: float = option(0.9, "Threshold of confidence, and amplitude of the change.", least=0)
    gamma: float = option(0.2, "How fast the perturbation saturates.", above=0)
    nu: float = option(1000.0, "Steepness of the gate.", above=0)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        top = probs.amax(1, keepdim=True)  # [N, 1]
        # a = sigmoid(nu (beta - s)), which cannot overflow
        gate = (self.nu * (self.beta - top)).sigmoid()  # [N, 1]
        perturbation = reverse_sigmoid(probs, self.beta, self.gamma, clamped=True)
        return distributions(probs - gate * perturbation)
