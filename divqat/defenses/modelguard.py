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
MARGIN = 1e-4  # lead of the top class over the others
THIRDS = 80  # steps of the ternary search: (2 / 3)^80 is below the precision of float64


@dataclass(frozen=True, kw_only=True)
class ModelGuard(Defense):
    """The common part of both variants.

    Args:
        epsilon: bound of |y' - y|_1, 0 to 2 (1 in the authors' scripts).
    """

    keeps_top1: ClassVar[bool] = True
    strength: ClassVar[str | None] = "epsilon"

    epsilon: float = option(1.0, "Largest L1 distance to the clean answer.", least=0, most=2)


@dataclass(frozen=True, kw_only=True)
class ModelGuardW(ModelGuard):
    """The least likely answer that still names the top class.

        min_y' sum_k y'_k log y_k,   y' in the simplex,   |y' - y|_1 <= epsilon,   same argmax

    Tang et al.: "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks",
    USENIX Security 2024. The authors pass this linear program to a solver; here
    :func:`least_likely` solves it for all rows at once. As in their code log y is log(y + 1e-6),
    and the lead of the top class is 1e-4, but here at most epsilon / 4, so that there always is a
    solution, even for answers with ties.
    """

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        # ties go to the lower index
        y, order = probs.double().sort(dim=1, descending=True, stable=True)
        released = least_likely(y / y.sum(1, keepdim=True), self.epsilon)
        return torch.empty_like(probs).scatter(1, order, released.to(probs.dtype))


def least_likely(y: Tensor, epsilon: float) -> Tensor:
    """The linear program of :class:`ModelGuardW`, to the precision of float64.

    For a given mass t of the top class, the best answer is greedy: the other classes have at most
    t - margin, and mass moves from the most likely of them to the least likely. The objective is
    convex in t, so that a ternary search finds the best t.

    Args:
        y: float64 [N, K], rows in descending order and of sum 1.
        epsilon: bound of the L1 distance.

    Returns:
        float64 [N, K], in the same order.
    """
    margin = min(MARGIN, epsilon / 4)
    top, rest = y[:, :1], y[:, 1:].flip(1)  # [N, 1], and [N, K - 1] in ascending order
    costs = (torch.cat([top, rest], 1) + FLOOR).log()

    def answer(t: Tensor) -> Tensor:  # [N, 1] -> [N, K], the top class first, the rest ascending
        limit = t - margin
        kept = rest.minimum(limit)
        # The optimum without the L1 bound; no more mass than it needs is moved.
        ideal = fill(1 - t, limit.expand_as(rest))
        needed = (ideal - kept).clamp(min=0).sum(1, keepdim=True)
        # All increases, including that of the top class, are half of the L1 distance.
        up = (epsilon / 2 - (t - top).clamp(min=0)).minimum(needed)
        down = up + t + kept.sum(1, keepdim=True) - 1
        gained = fill(up, limit - kept)
        lost = fill(down, kept.flip(1)).flip(1)
        return torch.cat([t, kept + gained - lost], 1)

    # Bounds of t: all decreases, sum_j (z_j - t)+ with z the mass plus its margin, are at most
    # epsilon / 2, and the classes have room for a total mass of 1.
    count = torch.arange(1, y.shape[1] + 1)
    z = torch.cat([top, rest + margin], 1).sort(1, descending=True).values
    low = ((z.cumsum(1) - epsilon / 2) / count).amax(1, keepdim=True)
    low = low.clamp(min=(1 + (y.shape[1] - 1) * margin) / y.shape[1])
    high = (top + epsilon / 2).clamp(max=1)
    for _ in range(THIRDS):
        third = (high - low) / 3
        a, b = ((answer(t) * costs).sum(1, keepdim=True) for t in (low + third, high - third))
        low, high = torch.where(a > b, low + third, low), torch.where(a > b, high, high - third)
    best = answer((low + high) / 2)
    return torch.cat([best[:, :1], best[:, 1:].flip(1)], 1)


@dataclass(frozen=True, kw_only=True)
class ModelGuardS(ModelGuard):
    """Answers from a small set that grows only when necessary.

    Tang et al.: "ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks",
    USENIX Security 2024: clusters the answers online, separately for each top class. An answer is
    replaced by the first centroid of its class within an L1 distance of epsilon; if there is none,
    it is released unchanged and becomes the next centroid. Centroids never move: a repeated query
    gets the same answer, and splitting queries into several calls makes no difference, but their
    order does.

    These are the defaults of the authors' code, which can also place new centroids by sampling, or
    move them by k-means. Answers depend on all earlier queries: for a fresh start, use a new copy
    from :meth:`fit`.
    """

    remembers: ClassVar[bool] = True

    # By top class, float32 [number of centroids, num_classes]; replaced, never changed in place.
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
        object.__setattr__(self, "_centroids", centroids)  # the dataclass is frozen
        return released


def quantize(answers: Tensor, centroids: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The centroids that replace ``answers`` [N, K], and ``centroids`` [M, K] plus new ones."""
    far = torch.cdist(answers, centroids, p=1) > epsilon  # [N, M]
    # An extra column, so that the index of the first near centroid is M if there is none.
    first = torch.cat([far, torch.zeros(len(far), 1, dtype=torch.bool)], 1).int().argmin(1)
    left = (first == len(centroids)).nonzero()[:, 0]
    # The first remaining answer is a new centroid, to which later ones may be near, and so on.
    while len(left):
        far_from_new = torch.cdist(answers[left], answers[left[:1]], p=1)[:, 0] > epsilon
        first[left[~far_from_new]] = len(centroids)
        centroids = torch.cat([centroids, answers[left[:1]]])
        left = left[far_from_new]
    return centroids[first], centroids
