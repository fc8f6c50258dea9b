"""The policy of :class:`divqat.attacks.knockoff_adaptive.KnockoffAdaptive`: a gradient bandit."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")


class GradientBandit:
    """Draws images without replacement, and more often from groups that were rewarded.

    The gradient bandit of Sutton and Barto, "Reinforcement Learning" (2nd edition, section 2.8),
    with the step sizes of KnockoffNets (section 4.1.2). A group without remaining images has
    probability 0. It draws from torch's global generator.

    Args:
        groups: int64 [N], the group of each image, from 0.
    """

    def __init__(self, groups: Tensor) -> None:
        order = torch.randperm(len(groups))
        count = int(groups.max()) + 1
        self.waiting = [order[groups[order] == group].tolist() for group in range(count)]
        self.preferences = torch.zeros(count, dtype=torch.float64)  # H
        self.drawn = torch.zeros(count, dtype=torch.int64)  # N(z), the rewards of each group so far

    def policy(self) -> Tensor:  # float64 [groups]
        """The probability of each group."""
        empty = torch.tensor([not rows for rows in self.waiting])
        # pi(z) = exp(H(z)) / sum_z' exp(H(z'))
        return self.preferences.masked_fill(empty, NEVER).softmax(0)

    def draw(self, count: int) -> tuple[list[int], list[int], list[Tensor]]:
        """Draw ``count`` images: their rows, their groups and the policies that drew them."""
        rows, groups, policies = [], [], []
        for _ in range(count):
            policies.append(self.policy())
            groups.append(int(policies[-1].multinomial(1)))
            rows.append(self.waiting[groups[-1]].pop())
        return rows, groups, policies

    def learn(self, group: int, policy: Tensor, advantage: float) -> None:
        """Update the preferences after an image of ``group``, drawn by ``policy``, had this
        advantage over earlier ones."""
        self.drawn[group] += 1
        step = advantage / int(self.drawn[group])
        # H(z) += (r - mean r) / N(z) (1 - pi(z));  H(z') -= (r - mean r) / N(z) pi(z')
        self.preferences -= step * policy
        self.preferences[group] += step


def certainty(answers: Tensor) -> Tensor:  # [N, num_classes] -> [N]
    """The margin of the most probable class, y'_k1 - y'_k2."""
    first, second = answers.topk(2).values.unbind(1)
    return first - second


def diversity(answers: Tensor, start: int, window: int) -> Tensor:  # [N, num_classes]
    """sum_k max(0, y'_k - mean y'_k) of the answers from ``start`` on, [N - start].

    The mean is over the ``window`` previous answers; for the first answer it is uniform.
    """
    values = []
    for t in range(start, len(answers)):
        past = answers[max(0, t - window) : t]
        mean = past.mean(0) if t else torch.full_like(answers[0], 1 / answers.shape[1])
        values.append((answers[t] - mean).clamp(min=0).sum())
    return torch.stack(values)


def advantages(rewards: Tensor, start: int, window: int) -> list[float]:  # [N, kinds]
    """How far the rewards from ``start`` on exceed the mean of the ``window`` previous images.

    Each kind of reward is scaled to [0, 1] over the window and the image itself, then the kinds are
    summed, so that all have equal weight; a kind that is constant there counts as 0. The advantage
    of the first image is 0.
    """
    values = []
    for t in range(start, len(rewards)):
        recent = rewards[max(0, t - window) : t + 1]
        low, high = recent.amin(0), recent.amax(0)
        scaled = torch.where(high > low, (recent - low) / (high - low), 0.0).sum(1)
        values.append(float(scaled[-1] - scaled[:-1].mean()) if t else 0.0)
    return values
