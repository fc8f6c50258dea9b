"""Skeptical student: trust the victim's probabilities with an early section of the clone only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat._util.settings import option
from divqat.attacks.answers import distributions
from divqat.attacks.attack import Task
from divqat.attacks.inner import trace
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.training import Loss
from divqat.data.batches import to_float
from divqat.models.blocks import conv_bn, initialize

SEQUENCES = ("features", "blocks")  # where the networks of divqat.models keep their sections


@dataclass(frozen=True, kw_only=True)
class SkepticalStudent(KnockoffNets):
    """Distil the answers into a shallow auxiliary classifier; the clone itself learns labels.

    Kundu, Sun, Fu, Pedram, Beerel, "Analyzing the Confidentiality of Undistillable Teachers in
    Knowledge Distillation" (NeurIPS 2021), an attack on teachers whose probabilities mislead. The
    clone's sections end where its feature maps get smaller. Auxiliary classifier a reads the first
    section, b the last but one (the same section if there are two), f is the clone, t the victim's
    answer, y its most probable class, and p^T the distribution proportional to p^(1/T). After
    ``delay`` of the training, in which L = CE(f, y),

        L = CE(f, y) + alpha T^2 KL(t^T || a^T) + (1 - alpha) CE(a, y)
                     + beta KL(f^T || b^T) + (1 - beta) CE(b, y)

    with the beta of the authors' code and, as there, no T^2 beside it; alpha and T are those of
    students in "Undistillable" (Ma et al., ICLR 2021) on CIFAR-10, the length of the delay is ours.
    The auxiliary classifiers are dropped at the end.

    Where it differs: a distiller has true labels; a thief has none, so y is the answer's. With
    ``reading`` t is what it makes of the answer; from an answer that shows a label alone it is that
    label. No gradient of KL(f^T || b^T) goes to f, while in the authors' code it pulls the clone
    towards its own auxiliary classifier. The auxiliary classifiers have separable convolutions down
    to the clone's last width, as the authors' have, but one a section, and no attention.

    Raises:
        ValueError: a clone without an ``nn.Sequential`` named ``features`` or ``blocks`` of at
            least two sections; the networks of :mod:`divqat.models` have it.
    """

    alpha: float = option(0.9, "Weight of the victim's answer.", least=0, most=1)
    beta: float = option(0.3, "Weight of the clone's own answer.", least=0, most=1)
    temperature: float = option(4.0, "T of both distillations.", above=0)
    delay: float = option(0.1, "Share of the training before any distillation.", least=0, below=1)

    def _loss(self, task: Task) -> Loss:
        return _SkepticalLoss(self, _sections(task), task.classes).to(task.device)


class _SkepticalLoss(nn.Module):
    def __init__(self, attack: SkepticalStudent, sections: dict[str, int], classes: int) -> None:
        super().__init__()
        names, widths = list(sections), list(sections.values())
        self.attack, self.first, self.last = attack, names[0], names[-2]
        self.shallow = _auxiliary(widths, classes)
        self.deep = _auxiliary(widths[-2:], classes)

    def forward(self, clone: nn.Module, images: Tensor, targets: Tensor, done: float) -> Tensor:
        logits, seen = trace(clone, [self.first, self.last], images)
        label = targets.argmax(1)
        loss = F.cross_entropy(logits, label)
        if done < self.attack.delay:
            return loss
        alpha, beta, t = self.attack.alpha, self.attack.beta, self.attack.temperature
        a, b = self.shallow(seen[self.first][1]), self.deep(seen[self.last][1])
        given = distributions(targets ** (1 / t))
        own = (logits.detach() / t).softmax(1)
        # alpha T^2 KL(t^T || a^T) + (1 - alpha) CE(a, y)
        loss = loss + alpha * t**2 * _kl(given, a / t) + (1 - alpha) * F.cross_entropy(a, label)
        # beta KL(f^T || b^T) + (1 - beta) CE(b, y)
        return loss + beta * _kl(own, b / t) + (1 - beta) * F.cross_entropy(b, label)


def _kl(p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)), the mean over the images."""
    return F.kl_div(logits.log_softmax(1), p, reduction="batchmean")


def _sections(task: Task) -> dict[str, int]:
    """By the name of each section's last layer: the channels that leave it."""
    found = [
        name for name in SEQUENCES if isinstance(getattr(task.clone, name, None), nn.Sequential)
    ]
    names = [f"{name}.{i}" for name in found[:1] for i, _ in enumerate(getattr(task.clone, name))]
    with torch.no_grad():
        _, seen = trace(task.clone, names, to_float(task.query_set[:1]).to(task.device))
    maps = {name: output for name, (_, output) in seen.items() if output.dim() == 4}
    ends = [
        name
        for (name, here), (_, after) in pairwise([*maps.items(), ("", torch.empty(1, 0, 0, 0))])
        if here.shape[2:] != after.shape[2:]
    ]
    if len(ends) < 2:
        raise ValueError(
            f"clone: wanted an nn.Sequential named {' or '.join(SEQUENCES)} with at least 2 sizes "
            f"of feature maps, got {len(ends)} in {type(task.clone).__name__}"
        )
    return {name: maps[name].shape[1] for name in ends}


def _auxiliary(widths: list[int], classes: int) -> nn.Sequential:
    """A classifier of feature maps: a separable convolution for each section that it skips."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(conv_bn(inputs, inputs, stride=2, groups=inputs))
        layers.append(conv_bn(inputs, outputs, 1, activation=nn.ReLU()))
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    model = nn.Sequential(*layers, *pool)
    initialize(model)
    return model
