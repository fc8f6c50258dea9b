"""Attacks without data: a generator looks for images on which clone and victim differ."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from divqat._util.progress import progress
from divqat._util.settings import ConfigError, option
from divqat.attacks.attack import Attack, Extraction, Task
from divqat.attacks.generator import Generator
from divqat.attacks.memory import Memory
from divqat.attacks.training import autocast, set_lr
from divqat.attacks.zeroth_order import zeroth_order
from divqat.data.batches import to_uint8

# After so many rounds everything is stored and the clone shown: what a killed run repeats at most.
ROUNDS_PER_SAVE = 50
SAME_ANSWERS = 0.25  # share of images whose answers a probe may leave as they are, unwarned


@dataclass(frozen=True, kw_only=True)
class DataFree(Attack):
    """What DFME and MAZE share: rounds of a generator that is rewarded for disagreement and a clone
    that learns to agree.

    Per round the generator G takes ``generator_steps``, each on new images x = tanh(G(z)), to
    increase the mean of a distance d(x) between victim and clone. The victim is a black box, so d
    is differentiated by forward differences (:mod:`divqat.attacks.zeroth_order`). The clone then
    takes ``clone_steps`` on new images to decrease d, and ``replay_steps`` on images that it took
    such steps on, in all rounds so far. Both learning rates follow one schedule.

    Of the query set only the shape of an image is used. Queries are floats, as the differences are
    far below 1/255; only the memory and the transfer set keep images in 8 bits. Labels in place of
    probabilities make d piecewise constant, for which these attacks were not made.

    A victim that rounds its input to 8 bits, as int8 models do, hardly sees steps of the
    literature's 1e-3. That hides its gradient, but only until ``smoothing`` moves the average pixel
    by a level: ε = 2/255 · √D for images of D pixels, 0.06 for 8x8 and 0.43 for 3x32x32.

    The transfer set of the :class:`Extraction` is what the clone learned in the last round: all of
    them would be millions. Its ``queries`` are those of whole rounds; the rest of the budget is not
    spent. A run that was killed repeats up to ``ROUNDS_PER_SAVE`` rounds; what it had asked in
    these counts for the victim, but not here. The clone is watched after as many rounds.

    Args:
        query_budget: at most so many queries, ``queries_per_round`` of them in each round.
        lr: first learning rate of the clone (SGD with momentum, not Nesterov's).
        latent: length of z, which is standard normal.
        directions, smoothing: m and ε of that estimate.

    Raises:
        ConfigError: (a ValueError) the query budget allows no round.
    """

    query_budget: int = option(20_000_000, "Images asked about at most.", least=1)
    batch_size: int = option(256, "Images per step.", least=2)
    lr: float = option(0.1, "First learning rate of the clone.", above=0)
    generator_lr: float = option(1e-4, "First learning rate of the generator.", above=0)
    latent: int = option(256, "Numbers that the generator makes an image of.", least=1)
    generator_steps: int = option(1, "Steps of the generator in a round.", least=1)
    clone_steps: int = option(5, "Steps of the clone in a round, on new images.", least=1)
    replay_steps: int = option(0, "Steps of the clone in a round, on old images.", least=0)
    directions: int = option(1, "Directions in which the generator's loss is probed.", least=1)
    smoothing: float = option(1e-3, "How far it is probed, before the tanh.", above=0)

    #: Whether the clone's first step is on the images of the generator's last one, asked already.
    reuses_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_budget < self.queries_per_round:
            raise ConfigError(
                f"query_budget: wanted at least {self.queries_per_round}, which is one round, "
                f"got {self.query_budget}"
            )

    @property
    def queries_per_round(self) -> int:
        """What a round costs."""
        steps = self.generator_steps * (self.directions + 1) + self.clone_steps
        return self.batch_size * (steps - self.reuses_images)

    @property
    def learns_range(self) -> bool:
        """Whether the generator learns the brightness and contrast of its images."""
        return False

    @abstractmethod
    def distance(self, answers: Tensor, logits: Tensor) -> Tensor:  # [N, classes] twice -> [N]
        """d between the victim's answers (on any device) and the clone's logits, per image."""

    @abstractmethod
    def decay(self, done: float) -> float:
        """The factor of both learning rates after this share of the rounds."""

    @abstractmethod
    def generator_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """How the generator learns."""

    def _extract(self, task: Task) -> Extraction:
        rounds = self.query_budget // self.queries_per_round
        duel = Duel(self, task, rounds)
        task.afford((rounds - duel.round) * self.queries_per_round)
        todo = range(duel.round, rounds)
        for _ in progress(todo, type(self).__name__, total=len(todo), unit="round"):
            duel.play()
            if duel.round % ROUNDS_PER_SAVE == 0 or duel.round == rounds:
                duel.save()
                task.watch(task.clone.eval(), math.ceil(duel.round / ROUNDS_PER_SAVE))
        return Extraction(task.clone.eval(), duel.learned, rounds * self.queries_per_round)


class Duel:
    """Generator against clone: all that changes from round to round."""

    def __init__(self, attack: DataFree, task: Task, rounds: int) -> None:
        self.attack, self.task, self.rounds, self.round = attack, task, rounds, 0
        torch.manual_seed(attack.seed)
        self.seeds = torch.randint(2**62, (rounds,)).tolist()
        channels, height, width = shape = tuple(task.query_set.shape[1:])
        self.generator = Generator(
            attack.latent, (channels, height, width), learn_range=attack.learns_range
        )
        self.generator.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules = nn.ModuleList([task.clone, self.generator])
        self.clone_optimizer = torch.optim.SGD(
            task.clone.parameters(),
            lr=attack.lr,
            momentum=attack.momentum,
            weight_decay=attack.weight_decay,
        )
        self.generator_optimizer = attack.generator_optimizer(self.generator.parameters())
        self.memory = (
            Memory(rounds * attack.clone_steps, attack.batch_size, shape, task.classes)
            if attack.replay_steps
            else None
        )
        # What the clone learned in the last round: uint8 [M, C, H, W], float32 [M, classes].
        self.learned = (torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, task.classes))
        state = task.folder.load("duel.pt")
        if state is None:
            self.save()  # before the first query, so that a resumed run has the same weights
        else:
            self._load(state)

    def play(self) -> None:
        """One round.

        Raises:
            FloatingPointError: the distance of victim and clone is no longer finite.
        """
        attack = self.attack
        torch.manual_seed(self.seeds[self.round])
        decay = attack.decay(self.round / self.rounds)
        set_lr(self.clone_optimizer, attack.lr * decay)
        set_lr(self.generator_optimizer, attack.generator_lr * decay)
        for _ in range(attack.generator_steps):
            batch = self._generator_step()
        batches = [batch] if attack.reuses_images else []
        while len(batches) < attack.clone_steps:
            batches.append(self._ask(self._generate().detach().tanh()))
        for images, answers in batches:
            self._clone_step(images, answers)
        if self.memory:
            for batch in batches:
                self.memory.add(*batch)
            for _ in range(attack.replay_steps):
                images, answers = self.memory.draw(attack.batch_size)
                self._clone_step(images.to(self.task.device), answers.to(self.task.device))
        images, answers = map(torch.cat, zip(*batches, strict=True))
        self.learned = to_uint8(images).cpu(), answers.cpu()
        self.round += 1

    def save(self) -> None:
        """Keep everything; the state last, as it says how much of the memory counts."""
        folder = self.task.folder
        if self.memory:
            self.memory.save(folder)
        state = {
            "round": self.round,
            "modules": self.modules.state_dict(),
            "optimizers": [
                self.clone_optimizer.state_dict(),
                self.generator_optimizer.state_dict(),
            ],
            "learned": self.learned,
        }
        folder.save("duel.pt", state)

    def _load(self, state: dict[str, Any]) -> None:
        self.round, self.learned = state["round"], state["learned"]
        self.modules.load_state_dict(state["modules"])
        self.clone_optimizer.load_state_dict(state["optimizers"][0])
        self.generator_optimizer.load_state_dict(state["optimizers"][1])
        if self.memory:
            self.memory.load(self.task.folder, self.round * self.attack.clone_steps)

    def _generate(self) -> Tensor:  # float32 [batch_size, C, H, W], before the tanh
        z = torch.randn(self.attack.batch_size, self.attack.latent, device=self.task.device)
        with autocast(self.attack, z.device):
            return self.generator(z).float()

    def _ask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, self.task.query(images).to(self.task.device)

    def _generator_step(self) -> tuple[Tensor, Tensor]:
        """Returns the images, as they were before the step, and the answers."""
        attack, clone = self.attack, self.task.clone.eval()

        @torch.no_grad()
        def distance(images: Tensor, answers: Tensor) -> Tensor:
            return attack.distance(answers, clone(images))

        # Whatever made the images, answers to them are compared in float32: the differences are
        # too small for less.
        raw = self._generate()
        images, answers = self._ask(raw.detach().tanh())
        here = self._finite(distance(images, answers))
        answers_around = []

        def probe(x: Tensor) -> Tensor:
            moved, answers_there = self._ask(x.tanh())
            answers_around.append(answers_there)
            return distance(moved, answers_there)

        gradient = zeroth_order(probe, raw.detach(), here, attack.directions, attack.smoothing)
        if self.round == 0:
            self._warn_of_same_answers(answers, torch.stack(answers_around))
        self.generator_optimizer.zero_grad()
        raw.backward(-gradient / len(raw))  # the optimizer descends, the mean of d shall grow
        self.generator_optimizer.step()
        return images, answers

    def _warn_of_same_answers(self, answers: Tensor, answers_around: Tensor) -> None:
        """Warn of a victim whose answers do not show so small a step: [N, classes], and
        [directions, N, classes] after it."""
        same = float((answers_around == answers).all(2).float().mean())
        if same >= SAME_ANSWERS:
            pixels = math.prod(self.learned[0].shape[1:])
            warnings.warn(
                f"smoothing: a step of {self.attack.smoothing} left the answers to {same:.0%} of "
                "the images as they were, so the generator learns little; of an int8 victim with "
                f"{pixels} numbers per image wanted is about {2 / 255 * math.sqrt(pixels):.2g}",
                stacklevel=2,
            )

    def _clone_step(self, images: Tensor, answers: Tensor) -> None:
        clone = self.task.clone.train()
        with autocast(self.attack, images.device):
            logits = clone(images)
        loss = self._finite(self.attack.distance(answers, logits.float()).mean())
        self.clone_optimizer.zero_grad()
        loss.backward()
        self.clone_optimizer.step()

    def _finite(self, distance: Tensor) -> Tensor:
        if not distance.isfinite().all():
            raise FloatingPointError(
                f"the clone's loss is no longer finite in round {self.round + 1}; "
                f"lower lr ({self.attack.lr})"
            )
        return distance
