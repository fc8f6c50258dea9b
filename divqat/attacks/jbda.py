"""Jacobian-based dataset augmentation (Papernot et al., AsiaCCS 2017)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from divqat._util.settings import ConfigError, option
from divqat.attacks.answers import distributions
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.labeled import LabeledAttack
from divqat.attacks.training import Training, TransferAttack
from divqat.data.batches import to_float, to_uint8

STARTS = ("query_set", "owned")


@dataclass(frozen=True, kw_only=True)
class JBDA(LabeledAttack, TransferAttack):
    """Ask about a few seed images, then about what the clone of each round makes of all so far.

    Source: Papernot, McDaniel, Goodfellow, Jha, Celik, Swami, "Practical Black-Box Attacks against
    Machine Learning", AsiaCCS 2017, section 4, with its 150 seeds and step 0.1; the budget of 9600
    is six rounds that double the images. A round trains a clone on all answers, then moves

        x' = x + ε · sign(∇_x log softmax(f(x))_c),    c the victim's label of x,

    so f grows surer of c. Deviations: a round begins from the initial clone, so that each clone
    has seen all images equally often; it learns the probabilities where the victim shows them (the
    paper's victims show labels); queries are rounded to 8 bits, which is what an image file holds;
    no reservoir sampling and no alternating step, which save queries: the last round asks about
    random ones of its images when the budget does not allow all. Of the public versions, MAZE's
    climbs the logit and ModelGuard's ascends the cross-entropy, the opposite direction.

    The paper's seeds are images of the victim's kind. From others the attack stays far weaker:
    hand it such images as the query set, or as its own, with ``start="owned"``.

    Args:
        query_budget: all images asked about, the seeds included. Rounds go on until it is spent.
        start: where they are drawn from, without replacement: the query set, or the images that
            the attacker owns (:meth:`owning`; the victim's labels count, not theirs).
        seeds: images to start from, fewer than ``query_budget``.
        epsilon: how far a pixel moves, in units of the range of pixels, as in the paper: 0.1 are
            25.5 of 255 levels.
        epochs: of each round, over all images so far.

    Raises:
        ConfigError: no budget beyond the seeds: nothing would be made of them.
        ValueError: more seeds than there are images to draw them from.
    """

    query_budget: int = option(9600, "Images asked about, the seeds included.", least=1)
    start: str = option("query_set", "Where its first images are from.", choices=STARTS)
    seeds: int = option(150, "Images to start from.", least=1)
    epsilon: float = option(0.1, "How far a pixel moves, in parts of its range.", above=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds >= self.query_budget:
            raise ConfigError(
                f"seeds: wanted fewer than the query_budget of {self.query_budget}, got "
                f"{self.seeds}: no query would be left for what is made of them"
            )

    @property
    def owns(self) -> bool:
        return self.start == "owned"

    @property
    def copies(self) -> int:
        """New images that a round makes of each."""
        return 1

    def _extract(self, task: Task) -> Extraction:
        generator = torch.Generator().manual_seed(self.seed)
        source = task.query_set
        if self.owns:
            source = self._labeled(task).images.cpu()
            self._enough(len(source))
        sizes = self._sizes()
        images = source[torch.randperm(len(source), generator=generator)[: sizes[0]]]
        seeds = torch.randint(2**62, (len(sizes), self.epochs), generator=generator).tolist()
        rounds = [  # all of them made now, so that a resumed run starts from the same weights
            Training(self, replace(task, clone=copy.deepcopy(task.clone)), s, name=f"clone-{i}.pt")
            for i, s in enumerate(seeds)
        ]
        names = [f"answers-{i}.pt" for i in range(len(sizes))]
        task.afford(sizes[-1] - sum(map(task.asked, names)))
        answers = task.ask(images, names[0])
        clone = rounds[0].run(images, distributions(answers))
        for size, name, training in zip(sizes[1:], names[1:], rounds[1:], strict=True):
            new = self._augment(clone, images, answers, size - len(images), generator)
            images = torch.cat([images, new])
            answers = torch.cat([answers, task.ask(new, name)])
            clone = training.run(images, distributions(answers))
        return Extraction(clone, (images, answers), len(answers))

    def check(self, images: int) -> None:
        if not self.owns:
            self._enough(images)

    def _enough(self, available: int) -> None:
        if self.seeds > available:
            raise ValueError(
                f"seeds: wanted 1 to {available}, the images to draw them from, got {self.seeds}"
            )

    def _sizes(self) -> list[int]:
        """Images after each round."""
        sizes = [self.seeds]
        while sizes[-1] < self.query_budget:
            sizes.append(min(sizes[-1] * (1 + self.copies), self.query_budget))
        return sizes

    def _augment(
        self, clone: nn.Module, images: Tensor, answers: Tensor, count: int, generator: Generator
    ) -> Tensor:  # uint8 [count, C, H, W]
        """Images to ask about next, made of those already asked about."""
        goals = self._goals(answers.argmax(1), answers.shape[1], generator)
        # Which image, and which copy of it; only the last round makes fewer than there could be.
        chosen = torch.randperm(self.copies * len(images), generator=generator)[:count]
        row, number = chosen % len(images), chosen // len(images)
        device = next(clone.parameters()).device
        parts = [
            to_uint8(self._perturb(clone, to_float(x).to(device), goal.to(device))).cpu()
            for x, goal in zip(images[row].split(256), goals[row, number].split(256), strict=True)
        ]
        return torch.cat(parts)

    def _goals(self, labels: Tensor, classes: int, generator: Generator) -> Tensor:
        """The class that the clone grows surer of, int64 [N, copies], from labels [N]."""
        return labels[:, None]

    def _perturb(self, clone: nn.Module, x: Tensor, goals: Tensor) -> Tensor:
        # x' = x + ε sign(∇_x log softmax(f(x))_c); [-1, 1] is twice as wide as the unit of ε
        return x + 2 * self.epsilon * ascent(clone, x, goals)


def ascent(clone: nn.Module, x: Tensor, classes: Tensor) -> Tensor:  # [N, C, H, W]
    """sign(∇_x log softmax(f(x))_c), entries -1, 0 or 1, for a clone in eval mode."""
    x = x.detach().requires_grad_()
    gain = -F.cross_entropy(clone(x), classes, reduction="sum")
    return torch.autograd.grad(gain, x)[0].sign()
