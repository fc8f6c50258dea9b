"""Data-free attacks: a generator searches for images on which clone and victim differ."""

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

# Rounds between two saves and calls of ``watch``: a killed run repeats at most these.
ROUNDS_PER_SAVE = 50
SAME_ANSWERS = 0.25  # a warning follows if a probe changes no answer for this share of the images


@dataclass(frozen=True, kw_only=True)
class DataFree(Attack):
    """The common part of DFME and MAZE: in rounds, a generator is rewarded for disagreement between
    victim and clone, and the clone learns to agree.

    In each round the generator G takes ``generator_steps``, each on new images x = tanh(G(z)), to
    increase the mean of a distance d(x) between victim and clone. The victim is a black box, so d
    is differentiated by forward differences (:mod:`divqat.attacks.zeroth_order`). The clone then
    takes ``clone_steps`` on new images to decrease d, and ``replay_steps`` on images of its earlier
    steps, from all rounds so far. Both learning rates follow one schedule.

    The query set gives only the shape of an image. Queries are floats, as the differences are far
    below 1/255; only the memory and the transfer set keep images in 8 bits. Hard labels make d
    piecewise constant; these attacks are not meant for them.

    An int8 victim rounds its input to 8 bits and hardly reacts to steps of the literature's 1e-3.
    That hides its gradient, but only until ``smoothing`` moves the average pixel by one level:
    ε = 2/255 · √D for images of D pixels, 0.06 for 8x8 and 0.43 for 3x32x32.

    The transfer set of the :class:`Extraction` holds only the images of the clone's last round:
    all of them would be millions. Its ``queries`` count whole rounds; the rest of the budget is not
    spent. A killed run repeats up to ``ROUNDS_PER_SAVE`` rounds; the victim counts their queries
    twice, the :class:`Extraction` once. ``watch`` is called every ``ROUNDS_PER_SAVE`` rounds.

    Args:
        query_budget: the maximum number of queries, ``queries_per_round`` in each round.
        lr: initial learning rate of the clone (SGD with momentum, without Nesterov's).
        latent: length of z, which is standard normal.
        directions, smoothing: m and ε of :func:`divqat.attacks.zeroth_order.zeroth_order`.

    Raises:
        ConfigError: (a ValueError) the query budget is too small for one round.
    """

    query_budget: int = option(20_000_000, "Maximum number of queried images.", least=1)
    batch_size: int = option(256, "Images per step.", least=2)
    lr: float = option(0.1, "Initial learning rate of the clone.", above=0)
    generator_lr: float = option(1e-4, "Initial learning rate of the generator.", above=0)
    latent: int = option(256, "Length of the generator's input noise.", least=1)
    generator_steps: int = option(1, "Steps of the generator per round.", least=1)
    clone_steps: int = option(5, "Steps of the clone per round, on new images.", least=1)
    replay_steps: int = option(0, "Steps of the clone per round, on old images.", least=0)
    directions: int = option(1, "Directions of the forward differences.", least=1)
    smoothing: float = option(1e-3, "Step of the forward differences, before the tanh.", above=0)

    #: Whether the clone's first step reuses the images and answers of the generator's last step.
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
        """Queries per round."""
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
        """The factor of both learning rates after the share ``done`` of the rounds."""

    @abstractmethod
    def generator_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the generator."""

    def _extract(self, task: Task) -> Extraction:
        rounds = self.query_budget // self.queries_per_round
        duel = Duel(self, task, rounds)
        task.check_budget((rounds - duel.round) * self.queries_per_round)
        todo = range(duel.round, rounds)
        for _ in progress(todo, type(self).__name__, total=len(todo), unit="round"):
            duel.run_round()
            if duel.round % ROUNDS_PER_SAVE == 0 or duel.round == rounds:
                duel.save()
                task.watch(task.clone.eval(), math.ceil(duel.round / ROUNDS_PER_SAVE))
        return Extraction(task.clone.eval(), duel.learned, rounds * self.queries_per_round)


class Duel:
    """The training of generator and clone against each other: the state that rounds change."""

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
        # Images and answers of the clone's last round: uint8 [M, C, H, W], float32 [M, classes].
        self.learned = (torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, task.classes))
        state = task.folder.load("duel.pt")
        if state is None:
            self.save()  # before the first query, so that a resumed run starts from these weights
        else:
            self._load(state)

    def run_round(self) -> None:
        """Run one round.

        Raises:
            FloatingPointError: the distance between victim and clone is no longer finite.
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
        """Save everything; the state last, as it decides how much of the memory counts."""
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
        """Returns the images, as they were before the step, and the answers to them."""
        attack, clone = self.attack, self.task.clone.eval()

        @torch.no_grad()
        def distance(images: Tensor, answers: Tensor) -> Tensor:
            return attack.distance(answers, clone(images))

        # Distances are computed in float32 even under autocast: their differences are small.
        raw = self._generate()
        images, answers = self._ask(raw.detach().tanh())
        value = self._finite(distance(images, answers))
        answers_around = []

        def probe(x: Tensor) -> Tensor:
            nearby, nearby_answers = self._ask(x.tanh())
            answers_around.append(nearby_answers)
            return distance(nearby, nearby_answers)

        gradient = zeroth_order(probe, raw.detach(), value, attack.directions, attack.smoothing)
        if self.round == 0:
            self._warn_of_same_answers(answers, torch.stack(answers_around))
        self.generator_optimizer.zero_grad()
        raw.backward(-gradient / len(raw))  # the optimizer descends, but the mean of d must grow
        self.generator_optimizer.step()
        return images, answers

    def _warn_of_same_answers(self, answers: Tensor, answers_around: Tensor) -> None:
        """Warn if ``smoothing`` is too small a step to change the victim's answers.

        Args:
            answers: [N, classes].
            answers_around: after the steps, [directions, N, classes].
        """
        same = float((answers_around == answers).all(2).float().mean())
        if same >= SAME_ANSWERS:
            pixels = math.prod(self.learned[0].shape[1:])
            warnings.warn(
                f"smoothing: a step of {self.attack.smoothing} did not change the answers to "
                f"{same:.0%} of the images, so the generator learns little; for an int8 victim "
                f"with {pixels} values per image use about {2 / 255 * math.sqrt(pixels):.2g}",
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
