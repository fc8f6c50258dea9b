"""The training loss: a weighted sum of its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divqat.nn import DivQATLoss, MisdirectionLoss
from divqat.nn.ini import InI, without_conflicts
from divqat.nn.misleader import Misleader
from divqat.train.config import LOSS
from divqat.train.distributed import MicroBatch, World
from divqat.train.network import build_float
from divqat.train.optimizer import build_sgd, load_optimizer, set_learning_rate
from divqat.train.settings import LossSettings, MisdirectionSettings

# From images, float32 [M, C, H, W], to the logits of a frozen network, float32 [M, num_classes].
Teacher = Callable[[Tensor], Tensor]


class Objective:
    """L = CE(y, q) − λ T² D(q, p) + κ T² KL(r‖q) + w · mean_x~ CE(q(x~), t(x~)) + a thief's terms.

    q are the model's answers to training images, p the teacher's and r the reference's; a loss uses
    p or r, not both. x~ are proxies of a thief's images (:mod:`divqat.data.proxies`), t the targets
    of the misdirection. λ is ``weight``, κ ``distill``, w ``misdirect``. CE, D and KL are computed
    by :class:`divqat.nn.DivQATLoss` (the κ term as a divergence of weight −κ), the next term by
    :class:`divqat.nn.MisdirectionLoss`, the last by :class:`divqat.nn.ini.InI` or
    :class:`divqat.nn.misleader.Misleader`, with which the first is (1 − λ) CE(y, q). This class
    weights them and sums over micro-batches and processes.

    Args:
        settings: of the divergence.
        proxies: settings of the misdirection.
        world: the processes that share a step.
        parameters: of the model; InI compares gradients.
        warmup_steps: the steps in which λ rises from 0.
        misdirection, thief: these terms, if the loss has them.
    """

    def __init__(
        self,
        settings: LossSettings,
        proxies: MisdirectionSettings,
        world: World,
        parameters: list[nn.Parameter],
        warmup_steps: int,
        misdirection: MisdirectionLoss | None = None,
        thief: InI | Misleader | None = None,
    ) -> None:
        self.settings, self.proxies, self.world = settings, proxies, world
        self.parameters = parameters
        self.misdirection = None if misdirection is None else misdirection.to(world.device)
        self.thief = thief
        self.divergence: DivQATLoss | None = None
        if settings.kind.divergence_sign:
            names = [name for name in LOSS if name != "warmup_epochs"]
            arguments = {name: getattr(settings, name) for name in (*names, "label_smoothing")}
            if settings.distill:
                arguments |= {"weight": -settings.distill, "direction": "teacher_student"}
            self.divergence = DivQATLoss(**arguments, warmup_steps=warmup_steps).to(world.device)
        self.set_strength(1.0)

    def set_strength(self, strength: float) -> None:
        """Scale the loss weights λ and w of the defense by ``strength`` from now on."""
        self.strength = strength
        if self.divergence is not None and not self.settings.distill:
            sign = self.settings.kind.divergence_sign
            self.divergence.set_weight(strength * sign * float(self.settings.weight or 0))

    def start_step(self, number: int, share: float) -> None:
        """Set λ for step ``number``, counted from 0 over the whole training, and the learning rate
        of a thief that learns, to this ``share`` of its peak."""
        if self.divergence is not None:
            self.divergence.steps.fill_(number)
        if isinstance(self.thief, Misleader):
            set_learning_rate(self.thief.optimizer, share * self.settings.misleader_lr)

    def state(self) -> dict[str, Any]:
        """What a thief has learned, for the checkpoint."""
        if not isinstance(self.thief, Misleader):
            return {}
        network, optimizer = self.thief.thief, self.thief.optimizer
        return {"thief": {"model": network.state_dict(), "optimizer": optimizer.state_dict()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state`, which may hold other keys, too."""
        if isinstance(self.thief, Misleader):
            self.thief.thief.load_state_dict(state["thief"]["model"])
            load_optimizer(self.thief.optimizer, state["thief"]["optimizer"])

    def __call__(
        self,
        logits: Tensor,  # float32 [n + m, num_classes]
        labels: Tensor,  # int64 [n]
        images: Tensor,  # float32 [n + m, C, H, W]: n training images, then m proxies
        teacher_logits: Tensor | None,  # float32 [n, num_classes], if the loss has a divergence
        teacher: Teacher,
        micro_batch: MicroBatch,
        total: int,
        sums: Tensor,
    ) -> Tensor:
        """A micro-batch's share of the loss, [].

        Args:
            logits, labels, images: of the micro-batch.
            teacher_logits: of the teacher or the reference, for the training images.
            teacher: computes logits for the proxies, if the targets need them.
            micro_batch: the part of the step that this is.
            total: training images of the whole step.
            sums: float64 [5], is updated in place: this process's sums of loss, cross-entropy and
                divergence over its images, and of misdirection loss and misled answers over its
                proxies.
        """
        n = len(labels)
        loss, ce, divergence = self.loss_on_images(logits[:n], labels, teacher_logits)
        if self.misdirection is not None:
            loss = loss + self.misdirection.targets.acceptance(logits[:n])
        objective = loss * micro_batch.weight
        sums[:3] += micro_batch.count * torch.stack([loss.detach(), ce, divergence])
        if self.misdirection is not None and len(images) > n:
            needs_teacher = self.misdirection.targets.needs_teacher
            proxy_teacher_logits = teacher(images[n:]) if needs_teacher else None
            terms = self.misdirection.targets.terms(logits[n:], proxy_teacher_logits, images[n:])
            weight = self.strength * float(self.proxies.misdirect or 0)
            mean = weight * terms.loss / self.proxies.proxy_count(total)
            # summed over micro-batches and averaged over processes, this is w · mean
            objective = objective + mean * self.world.size
            sums[0] += total * mean.detach()
            sums[3:] += torch.stack([terms.loss.detach(), terms.misled])
        if isinstance(self.thief, InI):
            ini_terms = self.thief(logits, labels, images)
            sums[0] += total * sum(term.detach() for term in ini_terms)
            objective = without_conflicts([objective, *ini_terms], self.parameters)
        elif self.thief is not None and len(images) > n:
            self.thief.learn(logits[n:], images[n:])
            term = self.thief(logits[n:], images[n:])
            sums[0] += total * term.detach()
            objective = objective + term
        return objective

    def loss_on_images(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, cross-entropy and divergence of training images, each []; only the loss has a
        gradient. Shapes as in ``__call__``."""
        if self.divergence is None:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
            return loss, loss.detach(), torch.zeros_like(loss)
        loss = self.divergence(logits, labels, teacher_logits)
        if self.settings.method == "misleader" and self.settings.weight:
            smoothing = self.settings.label_smoothing
            excess = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            loss = loss - self.settings.weight * excess
        assert self.divergence.ce is not None and self.divergence.divergence is not None
        return loss, self.divergence.ce, self.divergence.divergence


def build_thief(
    settings: LossSettings, network: str, seed: int, shape: Mapping[str, Any], device: torch.device
) -> InI | Misleader | None:
    """The terms of InI or MISLEADER on ``device``, or None if the loss has none. The simulated
    thief has the victim's architecture.

    Args:
        network: name of the victim's network.
        seed: of the training.
        shape: from :func:`divqat.train.network.shape_of`.
    """
    misleads = settings.method == "misleader" and settings.misleader_lambda
    if settings.method != "ini" and not misleads:
        return None
    student = build_float(network, seed, shape, "student")
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.method == "ini":
        return InI(student, settings.ini_gamma, settings.ini_delta, settings.ini_epsilon)
    optimizer = build_sgd(
        student.parameters(), device, lr=settings.misleader_lr, momentum=0.9, weight_decay=5e-4
    )
    return Misleader(student, optimizer, settings.misleader_lambda, settings.misleader_steps)
