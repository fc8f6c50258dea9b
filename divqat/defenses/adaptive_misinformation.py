"""Adaptive Misinformation (Kariyappa and Qureshi, CVPR 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from divqat._util.settings import option
from divqat.defenses.defense import Defense, Owner
from divqat.defenses.network import train_network
from divqat.victim.runners import logits_function


def misinformation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - softmax(z)_label), mean over [N, num_classes] logits and int64 [N] labels.

    Computed from the logits, so that it stays finite if the label's probability rounds to 1.
    """
    # log(1 - p_y) = logsumexp of log p over the other classes
    others = logits.log_softmax(1).scatter(1, labels[:, None], -math.inf)
    return -others.logsumexp(1).mean()


@dataclass(frozen=True, kw_only=True)
class AdaptiveMisinformation(Defense):
    """Replace unconfident answers by those of a network that is trained to be wrong.

        a = 1 / (1 + exp(nu (s - tau))),    y' = (1 - a) y + a f(x),    s = max_k y_k

    Kariyappa, Qureshi: "Defending Against Model Stealing Attacks with Adaptive Misinformation",
    CVPR 2020 (arXiv 1911.07100). :meth:`fit` trains f from scratch on the owner's training set
    to avoid the right class, see :func:`misinformation_loss`. nu, the five epochs and the
    optimizer are those of Khaled et al., ICMLA 2023, who vary tau.

    Deviation, as there: in the paper the victim itself is trained with outlier exposure, so that s
    is small on foreign images, and f learns from those images, too. A post-hoc defense does not
    change the victim.

    Args:
        tau: answers less confident than this are replaced; above 1 all of them.
        nu: steepness of the gate (default 1000; the authors' code has 10000).
        epochs, batch_size, lr: settings of the training of f.
    """

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = "tau"

    tau: float = option(0.9, "Answers less confident than this are replaced.", least=0, most=2)
    nu: float = option(1000.0, "Steepness of the gate.", above=0)
    epochs: int = option(5, "Passes over the training set.", least=1)
    batch_size: int = option(32, "Images per step.", least=1)
    lr: float = option(0.001, "Initial learning rate.", above=0)

    _network: ClassVar[nn.Module | None] = None  # set on the instance by fit

    def fit(self, owner: Owner) -> AdaptiveMisinformation:
        fitted = super().fit(owner)
        network = train_network(
            owner,
            misinformation_loss,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
        )
        object.__setattr__(fitted, "_network", network)  # the dataclass is frozen
        return fitted

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        if self._network is None:
            raise RuntimeError("AdaptiveMisinformation: call fit(owner) first and use its result")
        wrong = logits_function(self._network)(images).softmax(1)  # [N, num_classes]
        top = probs.amax(1, keepdim=True)  # [N, 1]
        # a = sigmoid(nu (tau - s)), which cannot overflow
        gate = (self.nu * (self.tau - top)).sigmoid()  # [N, 1]
        return (1 - gate) * probs + gate * wrong
