"""Skeptical student: only an early section of the clone learns the victim's probabilities."""

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
    """Distill the answers into a shallow auxiliary classifier; the clone itself learns labels.

    Kundu, Sun, Fu, Pedram, Beerel, "Analyzing the Confidentiality of Undistillable Teachers in
    Knowledge Distillation" (NeurIPS 2021), an attack on teachers whose probabilities mislead. A
    section of the clone ends where its feature maps get smaller. Auxiliary classifier a reads the
    first section, b the last but one (the same section if there are two), f is the clone, t the
    victim's answer, y its most probable class, and p^T the distribution proportional to p^(1/T).
    In the share ``delay`` of the training L = CE(f, y), afterwards

        L = CE(f, y) + alpha T^2 KL(t^T || a^T) + (1 - alpha) CE(a, y)
                     + beta KL(f^T || b^T) + (1 - beta) CE(b, y)

    with the beta of the authors' code and, as there, without a factor T^2; alpha and T are those of
    students in "Undistillable" (Ma et al., ICLR 2021) on CIFAR-10, the length of the delay is ours.
    The auxiliary classifiers are dropped at the end.

    Deviations: distillation has true labels; an attacker has none, so y is the class of the answer.
    t is the answer after ``reading``, one-hot if the victim releases only labels. No gradient of
    KL(f^T || b^T) reaches f, while in the authors' code it pulls the clone towards its auxiliary
    classifier. The auxiliary classifiers have separable convolutions down to the clone's last
    width, like the authors', but one per section, and no attention.

    Raises:
        ValueError: the clone has no ``nn.Sequential`` named ``features`` or ``blocks`` with at
            least two sections; the networks of :mod:`divqat.models` have one.
    """

    alpha: float = option(0.9, "Weight of the victim's answer.", least=0, most=1)
    beta: float = option(0.3, "Weight of the clone's own probabilities.", least=0, most=1)
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
        logits, activations = trace(clone, [self.first, self.last], images)
        label = targets.argmax(1)
        loss = F.cross_entropy(logits, label)
        if done < self.attack.delay:
            return loss
        alpha, beta, t = self.attack.alpha, self.attack.beta, self.attack.temperature
        a = self.shallow(activations[self.first][1])
        b = self.deep(activations[self.last][1])
        target = distributions(targets ** (1 / t))
        clone_probs = (logits.detach() / t).softmax(1)
        # alpha T^2 KL(t^T || a^T) + (1 - alpha) CE(a, y)
        loss = loss + alpha * t**2 * _kl(target, a / t) + (1 - alpha) * F.cross_entropy(a, label)
        # beta KL(f^T || b^T) + (1 - beta) CE(b, y)
        return loss + beta * _kl(clone_probs, b / t) + (1 - beta) * F.cross_entropy(b, label)


def _kl(p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)), the mean over the images."""
    return F.kl_div(logits.log_softmax(1), p, reduction="batchmean")


def _sections(task: Task) -> dict[str, int]:
    """Output channels of each section, by the name of its last layer."""
    parts = [
        name for name in SEQUENCES if isinstance(getattr(task.clone, name, None), nn.Sequential)
    ]
    names = [f"{name}.{i}" for name in parts[:1] for i, _ in enumerate(getattr(task.clone, name))]
    with torch.no_grad():
        _, activations = trace(task.clone, names, to_float(task.query_set[:1]).to(task.device))
    maps = {name: output for name, (_, output) in activations.items() if output.dim() == 4}
    ends = [
        name
        for (name, output), (_, after) in pairwise([*maps.items(), ("", torch.empty(1, 0, 0, 0))])
        if output.shape[2:] != after.shape[2:]
    ]
    if len(ends) < 2:
        raise ValueError(
            f"clone: wanted an nn.Sequential named {' or '.join(SEQUENCES)} with at least 2 sizes "
            f"of feature maps, got {len(ends)} in {type(task.clone).__name__}"
        )
    return {name: maps[name].shape[1] for name in ends}


def _auxiliary(widths: list[int], classes: int) -> nn.Sequential:
    """A classifier of feature maps: a separable convolution in place of each later section."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(conv_bn(inputs, inputs, stride=2, groups=inputs))
        layers.append(conv_bn(inputs, outputs, 1, activation=nn.ReLU()))
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    model = nn.Sequential(*layers, *pool)
    initialize(model)
    return model
