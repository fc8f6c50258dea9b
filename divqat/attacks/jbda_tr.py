"""Jacobian-based augmentation towards random classes (Juuti et al., EuroS&P 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from divqat._util.settings import option
from divqat.attacks.jbda import JBDA, gradient_sign

STRIDE = 1.85  # length of all steps together, in units of epsilon


@dataclass(frozen=True, kw_only=True)
class JBDATR(JBDA):
    """JBDA whose new images move towards random classes other than the victim's label.

    Source: Juuti, Szyller, Marchal, Asokan, "PRADA: Protecting against DNN Model Stealing
    Attacks", EuroS&P 2019, the iterative targeted-random strategy. The defaults are those of the
    code of ModelGuard (Tang et al., USENIX Security 2024): 1000 seeds, a budget of 50 000, three
    new images per image and round, each by ``steps`` steps of projected gradient descent

        δ ← clip(δ + 1.85 ε/T · sign(∇_x log softmax(f(x + δ))_t), -ε, ε),    t ≠ c random.

    Deviation: t stays the same for all steps, as in PRADA (ModelGuard's code draws it anew in each
    step and may draw c), and the new images of one image have different t, as equal ones would
    waste a query. For the rest see :class:`JBDA`.

    Args:
        epsilon: largest change of a pixel, as a fraction of its range.
        steps: T.
        targets: new images per image and round, each with a random class.
    """

    query_budget: int = option(50_000, "Queried images, including the seeds.", least=1)
    seeds: int = option(1000, "Number of seed images.", least=1)
    steps: int = option(8, "Gradient steps per image.", least=1)
    targets: int = option(3, "New images per image and round.", least=1)

    @property
    def copies(self) -> int:
        return self.targets

    def _goals(self, labels: Tensor, classes: int, generator: Generator) -> Tensor:
        # t = c + 1 + (r + i) mod (K - 1) for copy i: uniform, never c, distinct where possible
        first = torch.randint(classes - 1, (len(labels), 1), generator=generator)
        offset = 1 + (first + torch.arange(self.targets)) % (classes - 1)  # [N, targets]
        return (labels[:, None] + offset) % classes

    def _perturb(self, clone: nn.Module, x: Tensor, goals: Tensor) -> Tensor:
        radius = 2 * self.epsilon  # [-1, 1] is twice as wide as the unit of epsilon
        low, high = (x - radius).clamp(min=-1), (x + radius).clamp(max=1)
        moved = x
        for _ in range(self.steps):
            step = STRIDE * radius / self.steps * gradient_sign(clone, moved, goals)
            moved = torch.clamp(moved + step, low, high)
        return moved
