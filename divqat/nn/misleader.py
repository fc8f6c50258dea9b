"""MISLEADER: distillation against a simulated thief that learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

CLIP = 5.0  # largest norm of a gradient of the thief


class Misleader:
    """max_V min_S λ KL(V(x̃)‖S(x̃)), the part of MISLEADER's loss that involves a thief.

    The whole loss of the victim V is, for training images x with labels y and a target network t,

        L = (1 − α) CE(y, V(x)) + α T² KL(t_T(x)‖V_T(x)) − λ KL(V(x̃)‖S(x̃)),

    whose first two terms :class:`divqat.train.objective.Objective` computes. x̃ are augmented
    training images, which stand for a thief's queries. In each step the thief's clone S first
    learns V's answers to them (:meth:`learn`: SGD on KL(V(x̃)‖S(x̃)), with clipped gradients); then
    V moves away from what S learned, whose answers are constants for V's gradient (:meth:`__call__`
    is the third term).

    Cheng et al., "MISLEADER: Defending against model extraction with ensembles of distilled
    models", arXiv 2506.02362, 2025. All formulas and numbers are from the authors' published code
    (LabRAI/MISLEADER: Defense/train_defense.py, Defense/ensemble.py, train.sh), as only the paper's
    abstract was at hand; its sections and equations are not cited for that reason. The script for
    CIFAR-10 uses (λ, T, α) = (0.001, 6, 0.3) for ResNet-18, (0.05, 4, 0.9) for MobileNetV2 and
    (0.01, 2, 0.3) for DenseNet-121; S has V's architecture, learns with momentum 0.9, weight decay
    5e-4, and a learning rate that falls from 0.01 like V's. V starts from new weights. The deployed
    victim averages the probabilities of three such V: :class:`divqat.models.Ensemble`.

    Otherwise than there:

    - S takes ``steps`` steps of SGD on the same x̃. The code adds five gradients at the same weights
      and takes one step.
    - Augmented images are drawn anew in each step, as many as ``proxy_share`` says, there 1. The
      code repeats those of the first epoch. For their distribution see
      :func:`divqat.data.distortions.augmented`; other proxies may be chosen.
    - x̃ share a batch with x, and so V's BatchNorm statistics, where each has its own there.
    - V's gradient is clipped only with ``grad_clip``, there at norm 5. V's probabilities are not
      clamped to at least 1e-7.
    - The victim is the network after the last epoch, there the best of all epochs on the test set.
    - V learns at the settings of this package's trainings, there for 261 epochs from a learning
      rate of 0.1. S computes in float32, whatever V does.
    - The target may have V's architecture; there it is the larger ResNet-34.

    Their evaluation differs, too: its clones (DFME/train_ensemble.py) take the softmax of the
    ensemble's probabilities, as if these were logits: of ten classes, a certain one gets 0.23.
    Here they see the probabilities.

    Args:
        thief: S, to logits [N, num_classes]; is put into training mode.
        optimizer: of S's parameters.
        weight: λ.
        steps: of S per step of V, at least 1.
    """

    def __init__(self, thief: nn.Module, optimizer: Optimizer, weight: float, steps: int) -> None:
        self.thief = thief.train()
        self.optimizer, self.weight, self.steps = optimizer, weight, steps

    def learn(
        self,
        logits: Tensor,  # float32 [m, num_classes], V's; no gradient flows to them
        images: Tensor,  # float32 [m, C, H, W]
    ) -> None:
        """Teach S the answers of V."""
        answers = logits.detach().log_softmax(1)
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            _divergence(answers, self.thief(images).log_softmax(1)).backward()
            nn.utils.clip_grad_norm_(self.thief.parameters(), CLIP)
            self.optimizer.step()

    def __call__(
        self,
        logits: Tensor,  # float32 [m, num_classes], V's
        images: Tensor,  # float32 [m, C, H, W]
    ) -> Tensor:  # []
        """−λ KL(V(x̃)‖S(x̃)), whose gradient goes to ``logits`` only."""
        with torch.no_grad():
            learned = self.thief(images).log_softmax(1)
        return -self.weight * _divergence(logits.log_softmax(1), learned)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean KL(p‖q), [], of log-probabilities [N, num_classes]."""
    return F.kl_div(q, p, reduction="batchmean", log_target=True)
