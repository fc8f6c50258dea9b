"""MAZE: model extraction with zeroth-order gradients (Kariyappa et al., CVPR 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat._util.settings import option
from divqat.attacks.answers import distributions
from divqat.attacks.data_free import DataFree


@dataclass(frozen=True, kw_only=True)
class MAZE(DataFree):
    """Data-free extraction that compares the distributions of victim and clone, with experience
    replay for the clone.

    Source: Kariyappa, Prakash, Qureshi, "MAZE: Data-Free Model Stealing Attack Using Zeroth-Order
    Gradient Estimation", CVPR 2021; defaults as in its public code, whose README has generator_lr
    1e-3 for Fashion-MNIST. With y the victim's answer and s the clone's logits

        d = KL(y ‖ softmax(s)) = Σ_k y_k (log y_k - log softmax(s)_k)

    SGD for both networks, with the same ``momentum`` and ``weight_decay``; both learning rates fall
    to 0 along a cosine. The clone's first step in a round reuses the generator's images, so that a
    round costs batch_size · (generator_steps · (directions + 1) + clone_steps - 1) queries.

    Deviations: replay draws from all images that the clone has learned (the code keeps one batch
    per round), with replacement, in 8 bits, which takes 5 GB of memory with the defaults and
    CIFAR-10; the clone is in eval mode while d is differentiated, as in DFME (in train mode batch
    norm would couple the images). See also :class:`DataFree`.

    Args:
        learn_range: the generator's last batch norm has weights, as in the public code. The
            gradients of all pixels add up in its bias: with learning rates that are high enough for
            100,000 queries it can diverge in the first rounds, until all images are black and the
            gradient vanishes. In that case set it to False.
    """

    query_budget: int = option(5_000_000, "Maximum number of queried images.", least=1)
    batch_size: int = option(128, "Images per step.", least=2)
    latent: int = option(100, "Length of the generator's input noise.", least=1)
    replay_steps: int = option(10, "Steps of the clone per round, on old images.", least=0)
    directions: int = option(10, "Directions of the forward differences.", least=1)
    learn_range: bool = option(True, "The generator learns the brightness of its images.")

    reuses_images: ClassVar[bool] = True

    @property
    def learns_range(self) -> bool:
        return self.learn_range

    def distance(self, answers: Tensor, logits: Tensor) -> Tensor:
        # d = Σ_k y_k (log y_k - log softmax(s)_k)
        return F.kl_div(logits.log_softmax(1), distributions(answers), reduction="none").sum(1)

    def decay(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2

    def generator_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, self.generator_lr, self.momentum, weight_decay=self.weight_decay
        )
