"""Maximizing Angular Deviation (Orekondy, Schiele, Fritz, ICLR 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from divqat._util.settings import option
from divqat.defenses.surrogate import SurrogateDefense

MOST_ENUMERATED = 10  # classes up to which all argmax-preserving vertices are tried
MARGIN = 1e-5  # that the top class of such a vertex is ahead, before it is scaled to sum 1


@dataclass(frozen=True, kw_only=True)
class MAD(SurrogateDefense):
    """Turn the gradient that an answer gives an attacker as far away as the L1 ball allows.

        max_y' |u / |u| - v / |v||²,    u = G^T y',   v = G^T y,   G_k = grad_w log F(x)_k

    Orekondy, Schiele, Fritz: "Prediction Poisoning: Towards Defenses Against DNN Model Stealing
    Attacks", ICLR 2020 (arXiv 1906.10908), section 4. As there, F is a surrogate with random
    weights and w the weights of its last layer; the best vertex y* of the allowed region is
    searched, and the answer moves towards it until it leaves the L1 ball (the line search; the
    angle grows on the way). Vertices are the one-hot rows, or with ``argmax_preserving`` the rows
    that are uniform over a set of classes with the top one among them ("MAD-argmax"): all such
    sets up to 10 classes, beyond that a greedy search that adds the best class again and again.

    The surrogate has to end in a linear layer. Then G_k is (e_k - p) times its input features,
    p = softmax(F(x)), and the angle between u and v is that between y' - p and y - p: features and
    biases drop out, and no gradient has to be computed.

    The objective is the paper's. The authors' code by default ranks vertices by |u - v| instead,
    in which p drops out too: it always moves to the least likely class. The code of Mazeika et al.
    (ICML 2022) maximizes 1 - cos(u, v), half of the objective, but does not stop at y*.

    Args:
        epsilon: see :class:`SurrogateDefense`.
        argmax_preserving: the top class stays.
    """

    argmax_preserving: bool = option(False, "The most probable class stays.")

    @property
    def keeps_top1(self) -> bool:
        """Whether the most probable class never changes, ties aside."""
        return self.argmax_preserving

    def _poison(self, surrogate: nn.Module, y: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            p = surrogate(images).double().softmax(1).cpu()  # [N, K]
        y = y.double()
        # top class first, and the lower index first where classes tie
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
    """Of ``sets``, 0 or 1 [M, K], the one for each row of v and p [N, K]: [N, K] of 0 or 1."""
    sets = sets.to(v)
    return sets[_cosines(v, p, v @ sets.T, p @ sets.T, sets.sum(1)).argmin(1)]


def _greedy(v: Tensor, p: Tensor) -> Tensor:
    """A set with the first class for each row of v and p [N, K]: [N, K] of 0 or 1."""
    chosen = torch.zeros_like(v)
    chosen[:, 0] = 1
    best, least = chosen, _cosines(v, p, v[:, :1], p[:, :1], 1)
    for size in range(2, v.shape[1] + 1):
        in_v, in_p = ((chosen * each).sum(1, keepdim=True) + each for each in (v, p))
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
        [N, M]. |v| is left in: it is the same for all sets of a row, and may be 0.
    """
    # <u, v> = sum_S v / s - <p, v>,    |u|² = 1 / s - 2 sum_S p / s + |p|²
    inner = in_v / size - (p * v).sum(1, keepdim=True)
    square = (1 - 2 * in_p) / size + (p * p).sum(1, keepdim=True)
    return inner / square.clamp(min=1e-12).sqrt()
