"""Copycat CNN (Correia-Silva, Berriel, Badue, De Souza, Oliveira-Santos, IJCNN 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divqat.attacks.answers import reading
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets


@dataclass(frozen=True, kw_only=True)
class CopycatCNN(KnockoffNets):
    """Query random natural images and learn hard labels only.

    "Copycat CNN: Stealing Knowledge by Persuading Confession with Random Non-Labeled Data": the
    stolen label of an image x is argmax_k y'_k(x), and the clone minimizes
    -log softmax(f(x))_label. A defense that keeps the most probable class has no effect on it.

    The paper fine-tunes a VGG-16 that is pre-trained on other images; to do so, pass such a clone.
    The authors' solver files train for 5 epochs with batches of 32, mirroring, lr 0.005 divided by
    10 after each third, momentum 0.9 and weight decay 5e-4. Here the learning rate follows a
    cosine, as for every clone.
    """

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        return super()._targets(task, images, reading("label")(answers))
