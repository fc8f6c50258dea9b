"""The targets that the model learns for foreign images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from divqat._util.seeds import derived_seed
from divqat.nn.decoy import Decoy

TARGETS = ("decoy", "reject", "permuted", "per_image", "least_likely", "second", "divergence")


class MisdirectionTerms(NamedTuple):
    """Sums over a batch of foreign images, each [].

    Attributes:
        loss: with gradient.
        misled: number of images whose top class is that of t(x~); for ``reject`` those without a
            positive logit, and for ``divergence``, which has no t, those whose top class is not the
            teacher's; float64.
    """

    loss: Tensor
    misled: Tensor


class MisdirectionTargets(nn.Module):
    """The target t(x~) of each foreign image, and the loss CE(q(x~), t(x~)).

    ``target``, with the teacher's classes ranked by its probabilities p:

    - ``reject``: none of the classes. The softmax has one class more, whose logit is fixed at 0:

          loss(x~) = -log 1 / (1 + sum_c exp z_c),

      and on training images the cross-entropy is that of this softmax, too, see
      :meth:`acceptance`. So foreign images get negative logits z, which the deployed network
      rounds up to 0 (:class:`divqat.nn.RectifiedOutput`): all of them get the same answer. Other
      targets are approximated by the network, and an attacker who knows them can learn from the
      deviations, however small; here there are none;
    - ``decoy``: an answer that depends on the image's brightness, see :class:`Decoy`. An attacker
      cannot undo it, unlike ``permuted``, which only renames the classes;
    - ``permuted``: π(first class), with a random permutation π without fixed points;
    - ``per_image``: a class other than the first, by a keyed hash of the image, so that it is
      always the same for the same image;
    - ``least_likely``: the last class;
    - ``second``: the second class;
    - ``divergence``: no target. The loss is log 2 − JS(q, p) instead, at least 0, with
      JS = KL(p‖m) / 2 + KL(q‖m) / 2, m = (p + q) / 2, at temperature 1. At q = p, where QAT starts,
      its gradient is 0, and quantization noise has to break the tie.

    Args:
        target: one of these.
        num_classes: at least 2.
        image_shape: (C, H, W).
        seed: of decoy, permutation and key.
        confidence: images whose top probability p by the teacher exceeds it have weight 1 − p;
            None: all have weight 1.
        decoy_key: of the decoy, see :class:`Decoy`; None: its W depends on ``seed``.

    Attributes:
        decoy: for the target ``decoy``, else None; call :meth:`Decoy.fit` first.
        needs_teacher: whether calls need the teacher's logits.
    """

    permutation: Tensor
    key: Tensor

    def __init__(
        self,
        target: str,
        num_classes: int,
        image_shape: tuple[int, int, int],
        seed: int,
        confidence: float | None = None,
        decoy_key: str | None = None,
    ) -> None:
        super().__init__()
        self.target, self.confidence = target, confidence
        generator = Generator().manual_seed(derived_seed(seed, "misdirection"))
        identity = torch.arange(num_classes)
        permutation = identity
        while (permutation == identity).any():  # e times on average
            permutation = torch.randperm(num_classes, generator=generator)
        key = torch.randint(2**62, (math.prod(image_shape),), generator=generator)
        self.register_buffer("permutation", permutation, persistent=target == "permuted")
        self.register_buffer("key", 2 * key + 1, persistent=target == "per_image")
        self.needs_teacher = target not in ("reject", "decoy") or confidence is not None
        self.decoy: Decoy | None = None
        if target == "decoy":
            decoy_seed = derived_seed(seed, "decoy")
            self.decoy = Decoy(num_classes, image_shape[0], decoy_seed, decoy_key)

    def terms(
        self,
        logits: Tensor,  # float32 [M, num_classes]
        teacher_logits: Tensor | None,  # float32 [M, num_classes], if ``needs_teacher``
        images: Tensor,  # float32 [M, C, H, W], from -1 to 1
    ) -> MisdirectionTerms:
        """The loss of foreign images, without a host sync; its gradient goes to ``logits`` only."""
        answered = logits.detach().argmax(1)
        if self.target == "reject":
            # log(1 + sum_c exp z_c)
            losses = F.softplus(logits.logsumexp(1))
            misled = logits.detach().amax(1) <= 0
        elif self.target == "divergence":
            assert teacher_logits is not None
            losses = math.log(2) - jensen_shannon(logits, teacher_logits)
            misled = answered != teacher_logits.argmax(1)
        else:
            targets = self(teacher_logits, images)
            losses = F.cross_entropy(logits, targets, reduction="none")
            misled = answered == (targets if targets.dim() == 1 else targets.argmax(1))
        if self.confidence is not None:
            assert teacher_logits is not None
            top = teacher_logits.softmax(1).amax(1)
            losses = losses * torch.where(top > self.confidence, 1 - top, 1.0)
        return MisdirectionTerms(losses.sum(), misled.double().sum())

    def acceptance(self, logits: Tensor) -> Tensor:  # [N, num_classes] -> []
        """What ``reject`` adds to the mean cross-entropy of training images, in nats; 0 for other
        targets.

        With one class more, the label's class has the probability exp z_y / (1 + S),
        S = sum_c exp z_c. So the cross-entropy grows by log(1 + 1/S).
        """
        if self.target != "reject":
            return logits.new_zeros(())
        return F.softplus(-logits.float().logsumexp(1)).mean()

    def forward(self, teacher_logits: Tensor | None, images: Tensor) -> Tensor:
        """t(x~): classes int64 [M], or answers float32 [M, num_classes] for ``decoy``; not for
        ``reject`` and ``divergence``."""
        if self.decoy is not None:
            return self.decoy(images)
        assert teacher_logits is not None
        if self.target == "least_likely":
            return teacher_logits.argmin(1)
        if self.target == "second":
            return teacher_logits.topk(2).indices[:, 1]
        first = teacher_logits.argmax(1)
        if self.target == "permuted":
            return self.permutation[first]
        # Multiply and add modulo 2^64, and keep the upper bits: integers, so that the order of the
        # sum does not matter (Dietzfelbinger, "Universal hashing and k-wise independent random
        # variables via integer arithmetic without primes", STACS 1996).
        bits = images.flatten(1).contiguous().view(torch.int32).long()  # [M, C · H · W]
        hashed = ((bits * self.key).sum(1) >> 32) & (2**31 - 1)
        classes = teacher_logits.shape[1]
        return (first + 1 + hashed % (classes - 1)) % classes


def jensen_shannon(
    logits: Tensor,  # float [M, num_classes]
    other: Tensor,  # float [M, num_classes]
) -> Tensor:  # [M]
    """Jensen-Shannon divergence of the two softmaxes, in nats, from 0 to log 2."""
    log_q, log_p = logits.log_softmax(1), other.log_softmax(1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    # (Σ q (log q − log m) + Σ p (log p − log m)) / 2
    return (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m)).sum(1) / 2
