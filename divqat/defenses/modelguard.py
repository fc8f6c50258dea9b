"""ModelGuard (Tang et al., USENIX Security 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from divqat._util.settings import option
from divqat.defenses.defense import Defense, Owner
from divqat.defenses.simplex import fill

FLOOR = 1e-6  # keeps log y finite
MARGIN = 1e-4  # that the top class has to be ahead of the others
THIRDS = 80  # steps of the search: (2 / 3)^80 is below the precision of float64


@dataclass(frozen=True, kw_only=True)
class ModelGuard(Defense):
    """What the two kinds share.

    Args:
        epsilon: most that an answer may differ from the clean one: |y' - y|_1, 0 to 2. (The
            authors' scripts have 1.)
    """

    keeps_top1: ClassVar[bool] = True
    strength: ClassVar[str | None] = "epsilon"

    epsilon: float = option(1.0, "Largest L1 distance to the clean answer.", least=0, most=2)


@dataclass(frozen=True, kw_only=True)
class ModelGuardW(ModelGuard):
    """The least likely answer that still names the top class.

        min_y' sum_k y'_k log y_k,   y' in the simplex,   |y' - y|_1 <= epsilon,   same argmax

    Tang et al.: "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks",
    USENIX Security 2024. The authors hand this linear program to a solver; here it is solved, for
    all rows at once, by :func:`least_likely`. As in their code log y is log(y + 1e-6) and the top
    class stays 1e-4 ahead, but only epsilon / 4 where that is less: then there always is a
    solution, also for answers in which classes tie.
    """

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        # of tied classes the one of lower index is the top one
        y, order = probs.double().sort(dim=1, descending=True, stable=True)
        released = least_likely(y / y.sum(1, keepdim=True), self.epsilon)
        return torch.empty_like(probs).scatter(1, order, released.to(probs.dtype))


def least_likely(y: Tensor, epsilon: float) -> Tensor:
    """The linear program of :class:`ModelGuardW`, to the precision of float64.

    With the mass t of the top class given, the best answer is greedy: the other classes hold at
    most t - margin, mass goes from the likeliest of them to the least likely. What that reaches is
    convex in t, so that a ternary search finds the best t.

    Args:
        y: float64 [N, K], rows in descending order and of sum 1.

    Returns:
        float64 [N, K], in the same order.
    """
    margin = min(MARGIN, epsilon / 4)
    top, rest = y[:, :1], y[:, 1:].flip(1)  # [N, 1], and [N, K - 1] in ascending order
    costs = (torch.cat([top, rest], 1) + FLOOR).log()

    def answer(t: Tensor) -> Tensor:  # [N, 1] -> [N, K], the top class first, the rest ascending
        most = t - margin
        kept = rest.minimum(most)
        # The best without the L1 ball; more than it asks for is not moved.
        ideal = fill(1 - t, most.expand_as(rest))
        wanted = (ideal - kept).clamp(min=0).sum(1, keepdim=True)
        # All that goes up, the top class included, is half of the L1 distance.
        up = (epsilon / 2 - (t - top).clamp(min=0)).minimum(wanted)
        down = up + t + kept.sum(1, keepdim=True) - 1
        gained = fill(up, most - kept)
        lost = fill(down, kept.flip(1)).flip(1)
        return torch.cat([t, kept + gained - lost], 1)

    # All that goes down, sum_j (z_j - t)+ with z the mass and the margin it has to keep, is at most
    # epsilon / 2; and the classes have room for a mass of 1.
    count = torch.arange(1, y.shape[1] + 1)
    z = torch.cat([top, rest + margin], 1).sort(1, descending=True).values
    low = ((z.cumsum(1) - epsilon / 2) / count).amax(1, keepdim=True)
    low = low.clamp(min=(1 + (y.shape[1] - 1) * margin) / y.shape[1])
    high = (top + epsilon / 2).clamp(max=1)
    for _ in range(THIRDS):
        third = (high - low) / 3
        a, b = ((answer(t) * costs).sum(1, keepdim=True) for t in (low + third, high - third))
        low, high = torch.where(a > b, low + third, low), torch.where(a > b, high, high - third)
    found = answer((low + high) / 2)
    return torch.cat([found[:, :1], found[:, 1:].flip(1)], 1)


@dataclass(frozen=True, kw_only=True)
class ModelGuardS(ModelGuard):
    """Answers out of a small set that grows only when it has to.

    Tang et al.: "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks",
    USENIX Security 2024: clusters the answers while they are asked for, those of each top class on
    their own. An answer is replaced by the first centroid of its class at an L1 distance of at most
    epsilon; where there is none it is released as it is and becomes the next centroid. Centroids
    never move: asked again, an image gets the same answer, and whether images are asked in one call
    or in several makes no difference. Their order does.

    These are the defaults of the authors' code, which can also place new centroids by sampling,
    or move them by k-means. What is shown depends on all that was asked before: a victim that is
    to start afresh needs a defense of its own, from :meth:`fit`.
    """

    remembers: ClassVar[bool] = True

    # By top class, float32 [number of centroids, num_classes]; replaced, never changed.
    _centroids: ClassVar[Mapping[int, Tensor]] = {}

    def fit(self, owner: Owner) -> ModelGuardS:
        return replace(self)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        top = probs.argmax(1)
        released, centroids = torch.empty_like(probs), dict(self._centroids)
        for label in top.unique().tolist():
            known = centroids.get(label, probs[:0])
            released[top == label], centroids[label] = quantize(
                probs[top == label], known, self.epsilon
            )
        object.__setattr__(self, "_centroids", centroids)  # frozen are the settings
        return released


def quantize(answers: Tensor, centroids: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The centroids that replace ``answers`` [N, K], and ``centroids`` [M, K] with the new ones."""
    far = torch.cdist(answers, centroids, p=1) > epsilon  # [N, M]
    # One more column, so that the first centroid that is near has the index M where there is none.
    first = torch.cat([far, torch.zeros(len(far), 1, dtype=torch.bool)], 1).int().argmin(1)
    left = (first == len(centroids)).nonzero()[:, 0]
    # The first answer left is a new centroid, which later ones may be near to, and so on.
    while len(left):
        far_from_new = torch.cdist(answers[left], answers[left[:1]], p=1)[:, 0] > epsilon
        first[left[~far_from_new]] = len(centroids)
        centroids = torch.cat([centroids, answers[left[:1]]])
        left = left[far_from_new]
    return centroids[first], centroids
