"""The part of misdirection in a training step: proxies of an attacker's queries, and their loss."""

from __future__ import annotations

import torch
from torch import Tensor

from divqat.data import ImageSet
from divqat.data.batches import to_uint8
from divqat.train import TrainConfig
from divqat.train.distributed import World
from divqat.train.proxies import Proxies, fit_misdirection


class Misdirected:
    """Misdirection with the defaults of ``divqat train --accuracy-budget``.

    Args:
        x: training images, float32 [N, C, H, W]; values outside [-1, 1] are clipped.
        target: int64 [N].
        classes: number of classes.
    """

    def __init__(self, x: Tensor, target: Tensor, classes: int) -> None:
        self.x, self.target = x.clamp(-1, 1).contiguous(), target  # as loaded in a training
        config = TrainConfig(method="divqat", teacher="-", accuracy_budget=0.5)
        images = ImageSet(to_uint8(self.x), target)
        self.weight, self.count = float(config.misdirect or 0), config.proxy_count(len(x))
        self.misdirection = fit_misdirection(config, config.seed, classes, images).to(x.device)
        self.proxies = Proxies(self.misdirection.source, config.seed, World(device=x.device))

    def draw(self) -> Tensor:
        """The proxies of a step, float32 [M, C, H, W]."""
        drawn = self.proxies(self.x, self.target, self.count)
        return drawn.contiguous(memory_format=torch.channels_last)

    def loss(self, logits: Tensor, proxies: Tensor) -> Tensor:
        """w · mean CE, [], of the model's logits [M, classes] for ``proxies``."""
        return (
            self.weight * self.misdirection.targets.terms(logits, None, proxies).loss / len(proxies)
        )
