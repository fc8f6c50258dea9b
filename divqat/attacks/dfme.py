"""Data-free model extraction (Truong et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from divqat._util.settings import option
from divqat.attacks.answers import distributions
from divqat.attacks.data_free import DataFree


@dataclass(frozen=True, kw_only=True)
class DFME(DataFree):
    """Data-free extraction that compares the logits of victim and clone.

    Source: Truong, Maini, Walls, Papernot, "Data-Free Model Extraction", CVPR 2021; defaults as in
    its public code for CIFAR-10 (for SVHN: 2 M queries, generator_lr 5e-5). With y the victim's
    answer and s the clone's logits

        d = 1/K Σ_k |v_k - s_k|,    v_k = log y_k - 1/K Σ_j log y_j

    where v are the victim's logits up to a constant. SGD for the clone, Adam for the generator;
    both learning rates are multiplied by ``lr_factor`` after each share in ``lr_drops``. A round
    costs batch_size · (generator_steps · (directions + 1) + clone_steps) queries.

    Deviations: learning rates drop in the exact round, not at the end of 50; the generator's
    gradient is that of the mean of d, not K times smaller (which makes no difference to Adam);
    probabilities are clamped to ``floor``, since released answers contain zeros. See also
    :class:`DataFree`.
    """

    floor: float = option(1e-12, "Lower bound of probabilities in logarithms.", above=0, below=1)
    lr_factor: float = option(0.3, "Factor of the learning rates.", above=0, most=1)
    lr_drops: tuple[float, ...] = option(
        (0.1, 0.3, 0.5), "Shares of the rounds after which it applies.", least=0, most=1
    )

    def distance(self, answers: Tensor, logits: Tensor) -> Tensor:
        # v_k = log y_k - mean_j log y_j
        log = distributions(answers).clamp(min=self.floor).log()
        v = log - log.mean(1, keepdim=True)
        # d = mean_k |v_k - s_k|
        return (v - logits).abs().mean(1)

    def decay(self, done: float) -> float:
        return self.lr_factor ** sum(done >= drop for drop in self.lr_drops)

    def generator_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.generator_lr)
