"""Misleading answers on proxies of a thief's images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from divqat.data import LabeledImages
from divqat.data.batches import batches, to_float, to_uint8
from divqat.data.proxies import proxy_batch, proxy_pools
from divqat.nn.decoy import Decoy, Sample
from divqat.seeds import derived_seed
from divqat.train.config import TrainConfig
from divqat.train.distributed import Team

# Proxies that a decoy is fitted to, as many as the training images that they are made from; large
# ones in parts of so many bytes.
SAMPLE, SAMPLE_BYTES = 2048, 2**26


class Astray(NamedTuple):
    """What a batch of proxies comes to, each [], sums over the proxies.

    Attributes:
        loss: of the misdirection; has the gradient.
        misled: how often the model's top class is that of t(x~), or, where ``divergence`` has no
            t, not the teacher's; float64.
    """

    loss: Tensor
    misled: Tensor


class Misdirection(nn.Module):
    """L = CE(y, q) − λ T² D(q, p) + κ T² KL(r‖q) + w · mean_x~ CE(q(x~), t(x~)), the last term.

    x~ are proxies of what a thief may ask about (:mod:`divqat.data.proxies`) and t(x~) is a class
    that has not to do with the teacher's, or an answer of that kind, so that hard labels are wrong,
    too, which a loss on training images does not see to. Of those such a training forgets less with
    κ (``distill``) above 0: r are the answers of the ``reference``, a plain QAT, which is asked in
    the teacher's place then. Nothing is read on the host.

    Our own; near it are Kariyappa and Qureshi, "Defending against model stealing attacks with
    adaptive misinformation", CVPR 2020, arXiv 1911.07100, §4, whose service mixes in the answers
    of a second network, trained on outliers to be wrong, where an input looks foreign. Here one
    network, of int8 weights, does both, and nothing is computed when it is asked.

    ``t`` (``misdirect_target``), with the teacher's classes in the order of its probabilities p:

    - ``decoy``: an answer that the picture's lights and shades decide, see :class:`Decoy`. A thief
      cannot undo it, as it can the next, which gives each class another name;
    - ``permuted``: π(first), π a random permutation that leaves no class where it is;
    - ``per_image``: a class other than the first, by a keyed hash of the image, so that the same
      image always has the same;
    - ``least_likely``: the last;
    - ``second``: the second;
    - ``divergence``: none. The loss is log 2 − JS(q, p) instead, at least 0, with
      JS = KL(p‖m) / 2 + KL(q‖m) / 2, m = (p + q) / 2, at temperature 1. At q = p, where QAT starts,
      its gradient is 0, and quantization noise has to break the tie.

    Args:
        config: ``misdirect_target``, ``proxy_confidence``, and ``seed``, from which permutation
            and key come.
        num_classes: at least 2. image_shape: (C, H, W).

    Raises:
        ValueError: fewer classes.

    Attributes:
        decoy: for that target; :meth:`Decoy.fit` comes first.
        asks: whether the teacher's answers to the proxies are needed.
    """

    permutation: Tensor
    key: Tensor

    def __init__(
        self, config: TrainConfig, num_classes: int, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"misdirect: wanted at least 2 classes, to answer another than the teacher, got "
                f"{num_classes}"
            )
        self.target, self.confidence = config.misdirect_target, config.proxy_confidence
        generator = Generator().manual_seed(derived_seed(config.seed, "misdirection"))
        own = torch.arange(num_classes)
        permutation = own
        while (permutation == own).any():  # e times on average
            permutation = torch.randperm(num_classes, generator=generator)
        key = torch.randint(2**62, (math.prod(image_shape),), generator=generator)
        self.register_buffer("permutation", permutation)
        self.register_buffer("key", 2 * key + 1)
        self.asks = self.target != "decoy" or self.confidence is not None
        self.decoy: Decoy | None = None
        if self.target == "decoy":
            seed = derived_seed(config.seed, "decoy")
            self.decoy = Decoy(num_classes, image_shape[0], seed)

    @classmethod
    def fitted(
        cls, config: TrainConfig, num_classes: int, train_set: LabeledImages, proxies: Proxies
    ) -> Misdirection:
        """One whose decoy, if it has one, knows what varies between the proxies and not between
        the classes; on the CPU."""
        made = cls(config, num_classes, train_set.image_shape)
        if made.decoy is not None:
            made.decoy.fit(proxies.sample(train_set))
        return made

    def forward(
        self,
        logits: Tensor,  # float32 [M, num_classes]
        teacher_logits: Tensor | None,  # float32 [M, num_classes], if ``asks``
        images: Tensor,  # float32 [M, C, H, W]
    ) -> Astray:
        """The loss of a batch of proxies; its gradient goes to ``logits`` only."""
        answered = logits.detach().argmax(1)
        if self.target == "divergence":
            assert teacher_logits is not None
            losses = math.log(2) - jensen_shannon(logits, teacher_logits)
            misled = answered != teacher_logits.argmax(1)
        else:
            targets = self.targets(teacher_logits, images)
            losses = F.cross_entropy(logits, targets, reduction="none")
            misled = answered == (targets if targets.dim() == 1 else targets.argmax(1))
        if self.confidence is not None:
            assert teacher_logits is not None
            top = teacher_logits.softmax(1).amax(1)
            losses = losses * torch.where(top > self.confidence, 1 - top, 1.0)
        return Astray(losses.sum(), misled.double().sum())

    def targets(self, teacher_logits: Tensor | None, images: Tensor) -> Tensor:
        """t(x~): classes, int64 [M], for ``decoy`` answers, float32 [M, num_classes]; not for
        ``divergence``."""
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

    def sample(
        self,
        train_set: LabeledImages,
    ) -> Iterator[Sample]:
        """About 2048 proxies and the images that they are made from, in parts, on the CPU; the same
        in every process and on every device."""
        generator = Generator().manual_seed(derived_seed(self.config.seed, "proxies"))
        at_once = max(1, min(SAMPLE, SAMPLE_BYTES // (4 * math.prod(train_set.image_shape))))
        loader = batches(train_set, min(at_once, len(train_set)), generator=generator)
        pools = {name: pool.cpu() for name, pool in self.pools.items()}
        for images, labels in islice(loader, -(-SAMPLE // at_once)):
            images, labels = to_uint8(images).cpu(), labels.cpu()
            names = self.config.proxies
            made = proxy_batch(names, images, generator, at_once, labels=labels, pools=pools)
            yield Sample(to_float(made), to_float(images), labels)

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
