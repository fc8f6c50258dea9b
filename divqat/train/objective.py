"""The loss of a training, put together from its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divqat.nn import DivQATLoss, MisdirectionLoss
from divqat.nn.ini import InI, without_conflicts
from divqat.train.config import LOSS
from divqat.train.distributed import Part, Team
from divqat.train.network import build_float
from divqat.train.settings import LossSettings, MisdirectionSettings

# Float32 images [M, C, H, W] to a frozen network's logits, float32 [M, num_classes].
Ask = Callable[[Tensor], Tensor]


class Objective:
    """L = CE(y, q) − λ T² D(q, p) + κ T² KL(r‖q) + w · mean_x~ CE(q(x~), t(x~)) + terms of InI.

    q are the model's answers to training images, p the teacher's and r the reference's, of which
    one is asked; x~ are proxies of a thief's images (:mod:`divqat.data.proxies`) and t the
    misdirection's targets. λ is ``weight``, κ ``distill``, w ``misdirect``. The first two terms are
    :class:`divqat.nn.DivQATLoss` (κ: its mirror image, of weight −κ), the next is
    :class:`divqat.nn.MisdirectionLoss`, the last :class:`divqat.nn.ini.InI`: here they are only
    weighed and added, over the parts of a step and the processes of a team.

    Args:
        settings, proxies: of the divergence, and of the misdirection.
        team: the processes that do a step together.
        parameters: of the model; InI compares gradients.
        warmup_steps: in which λ rises.
        misdirection, ini: those terms, where the loss has them.
    """

    def __init__(
        self,
        settings: LossSettings,
        proxies: MisdirectionSettings,
        team: Team,
        parameters: list[nn.Parameter],
        warmup_steps: int,
        misdirection: MisdirectionLoss | None = None,
        ini: InI | None = None,
    ) -> None:
        self.settings, self.proxies, self.team = settings, proxies, team
        self.parameters = parameters
        self.misdirection = None if misdirection is None else misdirection.to(team.device)
        self.ini = ini
        self.divergence: DivQATLoss | None = None
        if settings.kind.divergence_sign:
            names = [name for name in LOSS if name != "warmup_epochs"]
            arguments = {name: getattr(settings, name) for name in (*names, "label_smoothing")}
            if settings.distill:
                arguments |= {"weight": -settings.distill, "direction": "teacher_student"}
            self.divergence = DivQATLoss(**arguments, warmup_steps=warmup_steps).to(team.device)
        self.weaken(1.0)

    def weaken(self, share: float) -> None:
        """From here on the defense has this share of its weights in the loss, λ and w."""
        self.share = share
        if self.divergence is not None and not self.settings.distill:
            sign = self.settings.kind.divergence_sign
            self.divergence.set_weight(share * sign * float(self.settings.weight or 0))

    def start_step(self, number: int) -> None:
        """What follows is this step, counted from 0 over the whole training: λ may rise."""
        if self.divergence is not None:
            self.divergence.steps.fill_(number)

    def __call__(
        self,
        logits: Tensor,  # float32 [n + m, num_classes]
        labels: Tensor,  # int64 [n]
        images: Tensor,  # float32 [n + m, C, H, W]: n training images, then m proxies
        answers: Tensor | None,  # float32 [n, num_classes], if the divergence wants them
        ask: Ask,
        part: Part,
        total: int,
        sums: Tensor,
    ) -> Tensor:
        """A part's share of the loss, [].

        Args:
            logits, labels, images: of the part. answers: of the network that is asked, to the
                training images. ask: for its answers to proxies, where the targets need them.
            part: how much of the step it is. total: training images of the whole step.
            sums: float64 [5], gets added what it comes to: this process's sums over its images of
                loss, cross-entropy and divergence, over its proxies of misdirection loss and
                misled answers.
        """
        n = len(labels)
        loss, ce, divergence = self.of_images(logits[:n], labels, answers)
        objective = loss * part.weight
        sums[:3] += part.count * torch.stack([loss.detach(), ce, divergence])
        if self.misdirection is not None and len(images) > n:
            theirs = ask(images[n:]) if self.misdirection.targets.needs_teacher else None
            astray = self.misdirection.targets.terms(logits[n:], theirs, images[n:])
            # the sum over the parts and the mean over the processes is w · mean
            weight = self.share * float(self.proxies.misdirect or 0)
            mean = weight * astray.loss / self.proxies.proxy_count(total)
            objective = objective + mean * self.team.size
            sums[0] += total * mean.detach()
            sums[3:] += torch.stack([astray.loss.detach(), astray.misled])
        if self.ini is not None:
            terms = self.ini(logits, labels, images)
            sums[0] += total * sum(term.detach() for term in terms)
            objective = without_conflicts([objective, *terms], self.parameters)
        return objective

    def of_images(
        self, logits: Tensor, labels: Tensor, answers: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross-entropy and divergence of training images, each []; only the first has a
        gradient."""
        if self.divergence is None:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
            return loss, loss.detach(), torch.zeros_like(loss)
        loss = self.divergence(logits, labels, answers)
        assert self.divergence.ce is not None and self.divergence.divergence is not None
        return loss, self.divergence.ce, self.divergence.divergence


def ini_terms(
    settings: LossSettings, network: str, seed: int, shape: Mapping[str, Any], device: torch.device
) -> InI | None:
    """The terms of InI on ``device``, whose thief has the victim's architecture; of other methods,
    None.

    Args:
        network: its name. shape: of :func:`divqat.train.network.shape_of`.
    """
    if settings.method != "ini":
        return None
    student = build_float(network, seed, shape, "student")
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return InI(student, settings.ini_gamma, settings.ini_delta, settings.ini_epsilon)
