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
    """Query a few seed images, then images that the clone of each round makes of all earlier ones.

    Source: Papernot, McDaniel, Goodfellow, Jha, Celik, Swami, "Practical Black-Box Attacks against
    Machine Learning", AsiaCCS 2017, section 4, with its 150 seeds and step 0.1; the budget of 9600
    is six rounds that double the images. A round trains a clone on all answers, then moves

        x' = x + ε · sign(∇_x log softmax(f(x))_c),    c the victim's label of x,

    which raises the clone's probability of c. Deviations: every round starts from the initial
    clone, so that each clone has seen all images equally often; the clone learns probabilities if
    the victim releases them (the paper's victims release labels); queries are rounded to 8 bits, as
    in an image file; there is no reservoir sampling and no alternating step, which save queries.
    If the budget does not allow all images of the last round, a random part is queried. Of the
    public versions, MAZE's ascends the logit, and ModelGuard's ascends the cross-entropy, which is
    the opposite direction.

    The paper's seeds are images of the victim's kind. With other images the attack is far weaker:
    pass such images as the query set, or as owned images with ``start="owned"``.

    Args:
        query_budget: all queried images, including the seeds. Rounds go on until it is spent.
        start: the source of the seeds, drawn without replacement: the query set, or the images that
            the attacker owns (see :meth:`owning`; their labels are not used).
        seeds: number of seed images, less than ``query_budget``.
        epsilon: how far a pixel moves, as a fraction of its range, as in the paper: 0.1 is 25.5 of
            255 levels.
        epochs: of each round, over all images so far.

    Raises:
        ConfigError: the query budget is not larger than the number of seeds.
        ValueError: there are fewer images to draw from than seeds.
    """

    query_budget: int = option(9600, "Queried images, including the seeds.", least=1)
    start: str = option("query_set", "Source of the seed images.", choices=STARTS)
    seeds: int = option(150, "Number of seed images.", least=1)
    epsilon: float = option(
        0.1, "How far a pixel moves, as a fraction of its range.", above=0, most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds >= self.query_budget:
            raise ConfigError(
                f"seeds: wanted fewer than the query_budget of {self.query_budget}, got "
                f"{self.seeds}: no query would be left for new images"
            )

    @property
    def owns(self) -> bool:
        return self.start == "owned"

    @property
    def copies(self) -> int:
        """New images per image and round."""
        return 1

    def _extract(self, task: Task) -> Extraction:
        generator = torch.Generator().manual_seed(self.seed)
        source = task.query_set
        if self.owns:
            source = self._labeled(task).images.cpu()
            self._check_seeds(len(source))
        sizes = self._sizes()
        images = source[torch.randperm(len(source), generator=generator)[: sizes[0]]]
        seeds = torch.randint(2**62, (len(sizes), self.epochs), generator=generator).tolist()
        rounds = [  # created before the first query, so that a resumed run has the same weights
            Training(self, replace(task, clone=copy.deepcopy(task.clone)), s, name=f"clone-{i}.pt")
            for i, s in enumerate(seeds)
        ]
        names = [f"answers-{i}.pt" for i in range(len(sizes))]
        task.check_budget(sizes[-1] - sum(map(task.stored, names)))
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
            self._check_seeds(images)

    def _check_seeds(self, available: int) -> None:
        if self.seeds > available:
            raise ValueError(
                f"seeds: wanted 1 to {available}, the images to draw them from, got {self.seeds}"
            )

    def _sizes(self) -> list[int]:
        """Number of images after each round."""
        sizes = [self.seeds]
        while sizes[-1] < self.query_budget:
            sizes.append(min(sizes[-1] * (1 + self.copies), self.query_budget))
        return sizes

    def _augment(
        self, clone: nn.Module, images: Tensor, answers: Tensor, count: int, generator: Generator
    ) -> Tensor:  # uint8 [count, C, H, W]
        """The next images to query, made of the queried ones."""
        goals = self._goals(answers.argmax(1), answers.shape[1], generator)
        # Rows of images and numbers of copies; only in the last round the budget cuts them off.
        chosen = torch.randperm(self.copies * len(images), generator=generator)[:count]
        row, number = chosen % len(images), chosen // len(images)
        device = next(clone.parameters()).device
        parts = [
            to_uint8(self._perturb(clone, to_float(x).to(device), goal.to(device))).cpu()
            for x, goal in zip(images[row].split(256), goals[row, number].split(256), strict=True)
        ]
        return torch.cat(parts)

    def _goals(self, labels: Tensor, classes: int, generator: Generator) -> Tensor:
        """The class whose probability a step raises, int64 [N, copies], from labels [N]."""
        return labels[:, None]

    def _perturb(self, clone: nn.Module, x: Tensor, goals: Tensor) -> Tensor:
        # x' = x + ε sign(∇_x log softmax(f(x))_c); [-1, 1] is twice as wide as the unit of ε
        return x + 2 * self.epsilon * gradient_sign(clone, x, goals)


def gradient_sign(clone: nn.Module, x: Tensor, classes: Tensor) -> Tensor:  # [N, C, H, W]
    """sign(∇_x log softmax(f(x))_c), entries -1, 0 or 1, for a clone in eval mode."""
    x = x.detach().requires_grad_()
    gain = -F.cross_entropy(clone(x), classes, reduction="sum")
    return torch.autograd.grad(gain, x)[0].sign()
