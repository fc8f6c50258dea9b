"""Gradient redirection, GRAD² (Mazeika, Li, Forsyth, ICML 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from divqat._util.settings import option
from divqat.attacks.knockoff import KnockoffNets
from divqat.defenses.defense import Owner
from divqat.defenses.simplex import fill
from divqat.defenses.surrogate import SurrogateDefense
from divqat.victim import Victim

CHUNK = 32  # images whose gradients of all parameters are in memory at the same time

Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class GRAD2(SurrogateDefense):
    """Redirect the gradient that an attacker gets from an answer towards a direction z.

        max_y' <G^T y', z>,   G_k = grad_w log F(x)_k,   y' in the simplex, |y' - y|_1 <= epsilon

    Mazeika, Li, Forsyth: "How to Steer Your Adversary: Targeted and Efficient Model Stealing
    Defenses with Gradient Redirection", ICML 2022 (arXiv 2206.14157). F is a surrogate and w all of
    its parameters. The objective is linear in y', so the best answer is found exactly: with the
    scores c = G z, mass moves from the classes with the lowest scores to the one with the highest.
    The top class may change.

    ``"all-ones"`` is z = (1, …, 1); the scores of an image are then a single directional derivative
    of log F(x). ``"min-ip"`` is z = -G^T y, away from the clean gradient.

    The surrogate learns the victim's clean answers with soft cross-entropy by SGD: learning rate
    0.1, Nesterov momentum 0.9, weight decay 5e-4, batches of 128, for 10 epochs ("ALL-ONES_10" in
    the authors' code). That is :class:`divqat.attacks.KnockoffNets` on the victim.

    Deviations from that code: it distills on the attacker's query set, which an owner does not
    have; here it is the owner's training set. It stops a cosine schedule of 50 epochs after 10;
    here the schedule ends there. Its z has the size of the victim's parameters; here it has that of
    the surrogate's. For min-ip it takes the mean clean gradient of a batch, so that an answer
    depends on the other queries; here an answer depends on its own image only.

    Args:
        epsilon: see :class:`SurrogateDefense`.
        epochs: of the surrogate on the owner's training set.
        direction: ``"all-ones"`` or ``"min-ip"``, which is about three times slower.

    Raises:
        FloatingPointError: (:meth:`fit`) the surrogate's loss is no longer finite.
    """

    keeps_top1: ClassVar[bool] = False

    epochs: int = option(10, "Passes of the surrogate over the owner's training set.", least=1)
    direction: str = option(
        "all-ones", "Direction of the gradient.", choices=("all-ones", "min-ip")
    )

    def _train(self, network: nn.Module, owner: Owner, seed: int) -> nn.Module:
        distill = KnockoffNets(epochs=self.epochs, lr=0.1, batch_size=128, seed=seed)
        return distill(Victim(owner.model), owner.train.images, network).clone

    def _poison(self, surrogate: nn.Module, y: Tensor, images: Tensor) -> Tensor:
        if self.direction == "all-ones":
            scores = all_ones_scores(surrogate, images)
        else:
            scores = min_ip_scores(surrogate, images, y.to(images.device))
        return redirect(y.double(), scores.cpu(), self.epsilon)


def redirect(y: Tensor, scores: Tensor, epsilon: float) -> Tensor:
    """argmax over y' of <y', scores> in the simplex with |y' - y|_1 <= epsilon.

    Args:
        y: rows of sum 1, [N, num_classes].
        scores: [N, num_classes].

    Returns:
        [N, num_classes], of the dtype of ``y``.
    """
    order = scores.argsort(1)  # from the worst class to the best
    y = y.gather(1, order)
    others, best = y[:, :-1], y[:, -1:]
    # the best class gets min(epsilon / 2, 1 - its mass), from the worst classes first
    taken = fill(torch.full_like(best, epsilon / 2), others)
    moved = torch.cat([others - taken, best + taken.sum(1, keepdim=True)], 1)
    return torch.empty_like(y).scatter(1, order, moved)


def all_ones_scores(network: nn.Module, images: Tensor) -> Tensor:
    """G (1, …, 1): [N, num_classes] for images [N, C, H, W]."""
    parameters = _parameters(network)
    ones = {name: torch.ones_like(value) for name, value in parameters.items()}
    # (G z)_k = d/dt log F(x; w + t z)_k at t = 0
    return jvp(lambda w: _log_probs(network, w, images), (parameters,), (ones,))[1]


def min_ip_scores(network: nn.Module, images: Tensor, y: Tensor) -> Tensor:
    """-G G^T y, image by image: [N, num_classes] for images [N, C, H, W], y [N, num_classes]."""
    parameters = _parameters(network)

    def scores(image: Tensor, y: Tensor) -> Tensor:  # [C, H, W], [num_classes] -> [num_classes]
        def log_probs(w: Parameters) -> Tensor:
            return _log_probs(network, w, image[None])[0]

        (gradient,) = vjp(log_probs, parameters)[1](y)
        return -jvp(log_probs, (parameters,), (gradient,))[1]

    return vmap(scores, chunk_size=CHUNK)(images, y)


def _parameters(network: nn.Module) -> Parameters:
    return {name: value.detach() for name, value in network.named_parameters()}


def _log_probs(network: nn.Module, w: Parameters, images: Tensor) -> Tensor:
    return functional_call(network, w, (images,)).log_softmax(1)
