"""Misleading answers on proxies of a thief's images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from divqat.data.batches import to_float, to_uint8
from divqat.data.proxies import proxy_batch, proxy_pools
from divqat.train.config import TrainConfig
from divqat.train.distributed import Team
from divqat.train.folder import derived_seed


class Astray(NamedTuple):
    """What a batch of proxies comes to, each [], sums over the proxies.

    Attributes:
        loss: of the misdirection; has the gradient.
        moved: how often the model's top class is not the teacher's; float64.
    """

    loss: Tensor
    moved: Tensor


class Misdirection(nn.Module):
    """L = CE(y, q) − λ T² D(q, p) + w · mean_x~ CE(q(x~), t(x~)), the last term of it.

    x~ are proxies of what a thief may ask about (:mod:`divqat.data.proxies`) and t(x~) is a class
    that is not the teacher's, so that hard labels are wrong, too, which a loss on training images
    does not see to. Nothing is read on the host, and w is a tensor that keeps its place.

    Our own; near it are Kariyappa and Qureshi, "Defending against model stealing attacks with
    adaptive misinformation", CVPR 2020, arXiv 1911.07100, §4, whose service mixes in the answers
    of a second network, trained on outliers to be wrong, where an input looks foreign. Here one
    network, of int8 weights, does both, and nothing is computed when it is asked.

    ``t`` (``misdirect_target``), with the teacher's classes in the order of its probabilities p:

    - ``permuted``: π(first), π a random permutation that leaves no class where it is;
    - ``per_image``: a class other than the first, by a keyed hash of the image, so that the same
      image always has the same;
    - ``least_likely``: the last;
    - ``second``: the second;
    - ``divergence``: none. The loss is log 2 − JS(q, p) instead, at least 0, with
      JS = KL(p‖m) / 2 + KL(q‖m) / 2, m = (p + q) / 2, at temperature 1. At q = p, where QAT starts,
      its gradient is 0, and quantization noise has to break the tie.

    Args:
        config: ``misdirect`` w, ``misdirect_target``, ``proxy_confidence``, and ``seed``, from
            which permutation and key come.
        num_classes: at least 2. image_shape: (C, H, W).
    """

    weight: Tensor
    permutation: Tensor
    key: Tensor

    def __init__(
        self, config: TrainConfig, num_classes: int, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.target, self.confidence = config.misdirect_target, config.proxy_confidence
        generator = Generator().manual_seed(derived_seed(config.seed, "misdirection"))
        own = torch.arange(num_classes)
        permutation = own
        while (permutation == own).any():  # e times on average
            permutation = torch.randperm(num_classes, generator=generator)
        key = torch.randint(2**62, (math.prod(image_shape),), generator=generator)
        self.register_buffer("weight", torch.tensor(config.misdirect))
        self.register_buffer("permutation", permutation)
        self.register_buffer("key", 2 * key + 1)

    def forward(
        self,
        logits: Tensor,  # float32 [M, num_classes]
        teacher_logits: Tensor,  # float32 [M, num_classes]
        images: Tensor,  # float32 [M, C, H, W]
    ) -> Astray:
        """The loss of a batch of proxies; its gradient goes to ``logits`` only."""
        if self.target == "divergence":
            losses = math.log(2) - jensen_shannon(logits, teacher_logits)
        else:
            targets = self.targets(teacher_logits, images)
            losses = F.cross_entropy(logits, targets, reduction="none")
        if self.confidence is not None:
            top = teacher_logits.softmax(1).amax(1)
            losses = losses * torch.where(top > self.confidence, 1 - top, 1.0)
        moved = logits.detach().argmax(1) != teacher_logits.argmax(1)
        return Astray(losses.sum(), moved.double().sum())

    def targets(self, teacher_logits: Tensor, images: Tensor) -> Tensor:
        """t(x~), int64 [M]; not for ``divergence``."""
        if self.target == "least_likely":
            return teacher_logits.argmin(1)
        if self.target == "second":
            return teacher_logits.topk(2).indices[:, 1]
        first = teacher_logits.argmax(1)
        if self.target == "permuted":
            return self.permutation[first]
        # Multiply and add modulo 2^64, and keep the upper bits: as integers, in any order the same
        # (Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer
        # arithmetic without primes", STACS 1996).
        bits = images.flatten(1).contiguous().view(torch.int32).long()  # [M, C · H · W]
        hashed = ((bits * self.key).sum(1) >> 32) & (2**31 - 1)
        classes = teacher_logits.shape[1]
        return (first + 1 + hashed % (classes - 1)) % classes


def jensen_shannon(
    logits: Tensor,  # float [M, num_classes]
    other: Tensor,  # float [M, num_classes]
) -> Tensor:  # [M]
    """Jensen-Shannon divergence of the softmaxes, in nats: from 0 to log 2."""
    log_q, log_p = logits.log_softmax(1), other.log_softmax(1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    # (Σ q (log q − log m) + Σ p (log p − log m)) / 2
    return (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m)).sum(1) / 2


class Proxies:
    """The proxies that go with a training's batches.

    Each process draws its own, of its own images: with another number of processes they are
    others, of the same kinds.

    Args:
        config: ``proxies``, ``proxy_root`` and ``seed``. image_shape: (C, H, W).
        team: this process, of how many, and the device of its images.
    """

    def __init__(self, config: TrainConfig, image_shape: tuple[int, int, int], team: Team) -> None:
        self.config, self.team = config, team
        self.generator = Generator(team.device)
        self.pools = proxy_pools(
            config.proxies,
            image_shape,
            team.device,
            folder=config.proxy_root,
            seed=derived_seed(config.seed, "proxy pools"),
        )

    def start(self, epoch: int) -> None:
        """What follows are the proxies of this epoch."""
        self.generator.manual_seed(derived_seed(self.config.seed, "proxies", epoch, self.team.rank))

    def __call__(
        self,
        images: Tensor,  # float32 [n, C, H, W], a batch of training images
        labels: Tensor,  # int64 [n]
        total: int,  # training images of the step, of all processes
    ) -> Tensor:  # float32 [m, C, H, W]
        of_all = self.config.proxy_count(total)
        made = proxy_batch(
            self.config.proxies,
            to_uint8(images),
            self.generator,
            len(range(self.team.rank, of_all, self.team.size)),
            labels=labels,
            pools=self.pools,
        )
        return to_float(made)
