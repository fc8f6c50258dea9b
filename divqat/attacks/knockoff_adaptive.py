"""KnockoffNets with the adaptive strategy (Orekondy, Schiele, Fritz, CVPR 2019)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat._util.progress import progress
from divqat._util.settings import option
from divqat.attacks.answers import distributions
from divqat.attacks.attack import Task
from divqat.attacks.bandit import GradientBandit, advantages, certainty, diversity
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.training import autocast, sgd
from divqat.data.batches import to_float

REWARDS = ("certainty", "diversity", "loss")
TRANSFER = "transfer.pt"
THUMBNAIL = 8  # pixels along each side
ITERATIONS = 20  # of k-means


@dataclass(frozen=True, kw_only=True)
class KnockoffAdaptive(KnockoffNets):
    """Learn from the answers which groups of images to query.

    "Knockoff Nets: Stealing Functionality of Black-Box Models", section 4.1.2, which the authors'
    code omits. A gradient bandit over groups of images (:mod:`divqat.attacks.bandit`) chooses a
    group, from which an image is drawn without replacement. Rewards are the certainty of the
    answer, its difference from earlier answers, and the loss on it of a clone that is trained on
    the way: the cross-entropy -sum_k y'_k log softmax(f(x))_k before the clone learns the image. At
    the end a clone with the initial weights trains on the whole transfer set, as in
    :class:`KnockoffNets`.

    Deviations: the paper's actions are the labels of the query set, in a tree. Here the query set
    has no labels, so the groups are k-means clusters of grey thumbnails, in one level. The paper
    draws and learns image by image; here a round of ``round_size`` images is drawn before the
    policy learns from them, one by one. The paper rescales rewards to [0, 1] without saying how;
    here over the last ``window`` images, which are also the Delta of its means; the paper does not
    give its length.

    A killed run replays its rounds on the stored answers, without new queries.

    Args:
        query_budget: images drawn from the query set without replacement; None: all of them, which
            leaves no choice to the bandit.
    """

    rewards: tuple[str, ...] = option(REWARDS, "Rewards of an answer.", choices=REWARDS)
    groups: int = option(32, "Groups of images to choose from.", least=2)
    window: int = option(256, "Images that a reward is compared with.", least=1)
    round_size: int = option(64, "Images drawn before the policy learns.", least=1)

    def check(self, images: int) -> None:
        super().check(images)
        if self.groups > images:
            raise ValueError(
                f"groups: wanted at most the {images} images of the query set, got {self.groups}"
            )

    def _ask(self, task: Task, rows: Tensor) -> tuple[Tensor, Tensor]:
        finished = task.folder.load(TRANSFER)
        if finished is not None:
            return task.query_set[finished["rows"]], finished["answers"]
        # Only the number of rows counts: it is the checked budget.
        sizes = [len(part) for part in rows.split(self.round_size)]
        names = [f"round{number}.pt" for number in range(len(sizes))]
        task.check_budget(len(rows) - sum(map(task.stored, names)))
        bandit = GradientBandit(k_means(thumbnails(task.query_set), self.groups))
        probe = copy.deepcopy(task.clone)
        optimizer = sgd(probe, self)
        chosen: list[int] = []
        answers, rewards = torch.empty(0, task.classes), torch.empty(0, len(REWARDS))
        rounds = zip(sizes, names, strict=True)
        for size, name in progress(rounds, "rounds", total=len(sizes), unit="round"):
            drawn, groups, policies = bandit.draw(size)
            images = task.query_set[drawn]
            start, chosen = len(chosen), chosen + drawn
            answers = torch.cat([answers, task.ask(images, name)])
            probs = distributions(answers)
            losses = self._learn(probe, optimizer, to_float(images), probs[start:])
            new = [certainty(probs[start:]), diversity(probs, start, self.window), losses]
            rewards = torch.cat([rewards, torch.stack(new, 1)])
            chosen_rewards = rewards[:, [REWARDS.index(name) for name in self.rewards]]
            gains = advantages(chosen_rewards, start, self.window)
            for group, policy, advantage in zip(groups, policies, gains, strict=True):
                bandit.learn(group, policy, advantage)
        task.folder.save(TRANSFER, {"rows": chosen, "answers": answers})
        return task.query_set[chosen], answers

    def _learn(
        self, clone: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, targets: Tensor
    ) -> Tensor:  # float32 [N], the cross-entropy before the step
        device = next(clone.parameters()).device
        parts = (rows.to(device).split(self.batch_size) for rows in (images, targets))
        batches = list(zip(*parts, strict=True))
        with torch.no_grad(), autocast(self, device):
            clone.eval()
            losses = [F.cross_entropy(clone(x), y, reduction="none") for x, y in batches]
        before = torch.cat(losses).cpu()
        if not before.isfinite().all():
            raise FloatingPointError(
                f"the loss of the clone that gives rewards is not finite; lower lr ({self.lr})"
            )
        clone.train()
        for x, y in batches:
            if len(x) > 1:  # batch norm cannot train on a single image
                with autocast(self, device):
                    loss = F.cross_entropy(clone(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return before


def thumbnails(images: Tensor) -> Tensor:  # uint8 [N, C, H, W] -> float32 [N, 64] on the CPU
    """Grey thumbnails of 8x8 pixels."""
    parts = (to_float(part).mean(1, keepdim=True) for part in images.split(4096))
    return torch.cat([F.adaptive_avg_pool2d(part, THUMBNAIL).flatten(1).cpu() for part in parts])


def k_means(points: Tensor, count: int) -> Tensor:  # [N, D] -> int64 [N] from 0 to count - 1
    """The cluster of each point, by k-means from ``count`` random points (torch's global
    generator); a cluster may be empty."""
    centers = points[torch.randperm(len(points))[:count]]
    for _ in range(ITERATIONS):
        group = torch.cdist(points, centers).argmin(1)
        members = F.one_hot(group, count).to(points)  # [N, count]
        size = members.sum(0)[:, None]
        centers = torch.where(size > 0, members.T @ points / size, centers)
    return group
