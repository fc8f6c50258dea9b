"""Maximizing Angular Deviation (Orekondy, Schiele, Fritz, ICLR 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from divqat._util.settings import option
from divqat.defenses.surrogate import SurrogateDefense

MOST_ENUMERATED = 10  # largest number of classes for which all argmax-preserving vertices are tried
MARGIN = 1e-5  # lead of the top class of such a vertex, before it is scaled to sum 1


@dataclass(frozen=True, kw_only=True)
class MAD(SurrogateDefense):
    """Turn the gradient that an attacker gets from an answer as far as the L1 ball allows.

        max_y' |u / |u| - v / |v||²,    u = G^T y',   v = G^T y,   G_k = grad_w log F(x)_k

    Orekondy, Schiele, Fritz: "Prediction Poisoning: Towards Defenses Against DNN Model Stealing
    Attacks", ICLR 2020 (arXiv 1906.10908), section 4. As there, F is a surrogate with random
    weights and w the weights of its last layer. The best vertex y* of the allowed region is
    searched, and the answer moves towards it to the border of the L1 ball (the line search; the
    angle grows on the way). Vertices are the one-hot rows, or with ``argmax_preserving`` the rows
    that are uniform over a set of classes that contains the top one ("MAD-argmax"): all such sets
    for up to 10 classes, beyond that a greedy search that repeatedly adds the best class.

    The surrogate has to end in a linear layer. Then G_k is (e_k - p) times its input features,
    p = softmax(F(x)), and the angle between u and v is that between y' - p and y - p: features and
    biases cancel, and no gradient has to be computed.

    The objective is the paper's. The authors' code by default ranks vertices by |u - v| instead, in
    which p cancels, too: it always moves to the least likely class. The code of Mazeika et al.
    (ICML 2022) maximizes 1 - cos(u, v), half of the objective, but does not stop at y*.

    Args:
        epsilon: see :class:`SurrogateDefense`.
        argmax_preserving: keep the top class.
    """

    argmax_preserving: bool = option(False, "Keep the most probable class.")

    @property
    def keeps_top1(self) -> bool:
        """Whether the most probable class never changes, except for ties."""
        return self.argmax_preserving

    def _poison(self, surrogate: nn.Module, y: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            p = surrogate(images).double().softmax(1).cpu()  # [N, K]
        y = y.double()
        # top class first; ties go to the lower index
        order = y.sort(dim=1, descending=True, stable=True).indices
        best = self._vertices(y.gather(1, order), p.gather(1, order))
        target = torch.empty_like(y).scatter(1, order, best)
        # y' = (1 - a) y + a y*,   a = min(1, epsilon / |y - y*|_1)
        distance = (target - y).abs().sum(1, keepdim=True)
        a = (self.epsilon / distance.clamp(min=1e-12)).clamp(max=1)  # [N, 1]
        return y + a * (target - y)

    def _vertices(self, y: Tensor, p: Tensor) -> Tensor:  # both [N, K], the top class first
        """The best vertex of each row, [N, K]."""
        classes, v = y.shape[1], y - p
        if not self.argmax_preserving:
            return _best(v, p, torch.eye(classes))
        if classes <= MOST_ENUMERATED:
            others = torch.arange(2 ** (classes - 1))[:, None] >> torch.arange(classes - 1) & 1
            vertices = _best(v, p, torch.cat([torch.ones(len(others), 1), others], 1))
        else:
            vertices = _greedy(v, p)
        vertices[:, 0] += MARGIN
        return vertices / vertices.sum(1, keepdim=True)


def _best(v: Tensor, p: Tensor, sets: Tensor) -> Tensor:
    """The best of ``sets`` (0 or 1, [M, K]) for each row of v and p [N, K]: 0 or 1, [N, K]."""
    sets = sets.to(v)
    return sets[_cosines(v, p, v @ sets.T, p @ sets.T, sets.sum(1)).argmin(1)]


def _greedy(v: Tensor, p: Tensor) -> Tensor:
    """A set that contains the first class, for each row of v and p [N, K]: 0 or 1, [N, K]."""
    chosen = torch.zeros_like(v)
    chosen[:, 0] = 1
    best, least = chosen, _cosines(v, p, v[:, :1], p[:, :1], 1)
    for size in range(2, v.shape[1] + 1):
        in_v, in_p = ((chosen * x).sum(1, keepdim=True) + x for x in (v, p))
        cosines = _cosines(v, p, in_v, in_p, size).masked_fill(chosen > 0, math.inf)
        cosine, k = cosines.min(1, keepdim=True)
        chosen = chosen.scatter(1, k, 1.0)
        best = torch.where(cosine < least, chosen, best)
        least = least.minimum(cosine)
    return best


def _cosines(v: Tensor, p: Tensor, in_v: Tensor, in_p: Tensor, size: Tensor | int) -> Tensor:
    """|v| cos(u, v) for u = y* - p, where y* is uniform over a set of ``size`` classes.

    Args:
        v, p: y - p and p, [N, K].
        in_v, in_p: their sums over M sets, [N, M].
        size: of the sets, [M] or one for all.

    Returns:
        [N, M]. The factor |v| remains: it is the same for all sets of a row, and may be 0.
    """
    # <u, v> = sum_S v / s - <p, v>,    |u|² = 1 / s - 2 sum_S p / s + |p|²
    inner = in_v / size - (p * v).sum(1, keepdim=True)
    square = (1 - 2 * in_p) / size + (p * p).sum(1, keepdim=True)
    return inner / square.clamp(min=1e-12).sqrt()
