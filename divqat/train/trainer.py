"""What one training holds and does epoch by epoch."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from divqat._util.memory import reset_peak
from divqat._util.progress import progress
from divqat._util.seeds import derived_seed
from divqat.data import Splits, augment, batches
from divqat.data.batches import steps_per_epoch
from divqat.metrics import accuracy, mean_top_probability, predict, softmax
from divqat.nn import MisdirectionLoss
from divqat.quantize import freeze_batchnorm, freeze_observers, observe_first
from divqat.train.answers import teacher_logits
from divqat.train.budget import Budget, load_reference
from divqat.train.config import TrainConfig
from divqat.train.distributed import Team
from divqat.train.folder import Run
from divqat.train.graph import Captured, own_stream
from divqat.train.memory import StepMemory
from divqat.train.network import begin, shape_of
from divqat.train.objective import Objective, ini_terms
from divqat.train.observation import Observation
from divqat.train.optimizer import load_optimizer, set_learning_rate
from divqat.train.proxies import Proxies, fitted_misdirection
from divqat.train.step import Step, check_finite

CHECK_EVERY = 50  # steps between two looks at whether all numbers are finite


class Trainer:
    """Model, optimizer and what has been measured; ``epoch`` is the number of epochs done.

    After an epoch every process of the team holds the same.

    Args:
        config: the settings. splits: the data. teacher: of all methods but fp.
        team: this process and the others, on its device.
        folder: the run folder, for the teacher's answers.
    """

    def __init__(
        self, config: TrainConfig, splits: Splits, teacher: Run | None, team: Team, folder: Path
    ) -> None:
        device = team.device
        reset_peak(device)
        self.config, self.team, self.device = config, team, device
        self.delayed = config.delayed(team.size)
        self.epoch, self.rows = 0, list[dict[str, Any]]()
        # What a budget may go back to: where the last third began, and the last network inside.
        self.kept: dict[str, Any] | None = None
        train_set = splits.train.to(device)
        # In the place of a label its image's number, as the teacher's kept answers need it, too.
        numbers = torch.arange(len(train_set), device=device)
        self.train_set = replace(train_set, labels=numbers)  # type: ignore[type-var]
        self.validation = splits.validation
        self.shape = shape_of(splits)
        if teacher is not None and teacher.shape != self.shape:
            raise ValueError(
                f"teacher: wanted a model of {self.shape} like the data, got {teacher.shape}"
            )
        self.model = begin(config, self.shape, None if teacher is None else teacher.model, team)
        self.steps, self.drop_last = steps_per_epoch(len(self.train_set), config.batch_size)
        self.teacher_id = None if teacher is None else teacher.fingerprint
        misdirection: MisdirectionLoss | None = None
        if config.misdirect:
            misdirection = fitted_misdirection(config, config.seed, splits.num_classes, train_set)
        self.proxies: Proxies | None = None
        if config.shows_proxies:
            self.proxies = Proxies.of(config, config.seed, misdirection, train_set, team)
        reference = load_reference(config, teacher)
        known = reference if config.distill else teacher
        asked: nn.Module | None = None  # λ = 0 asks no teacher, nor does a decoy
        needs_teacher = misdirection is not None and misdirection.targets.needs_teacher
        if known is not None and (config.compares or needs_teacher):
            asked = known.model.requires_grad_(False)
            asked.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = Objective(
            config,
            config,
            team,
            list(self.model.parameters()),
            round(config.warmup_epochs * self.steps),
            misdirection,
            ini_terms(config, config.model, config.seed, self.shape, device),
        )
        kind = Observation if config.method == "ptq" else Step
        self.step = kind(self.model, asked, train_set.labels, team, self.objective, config, config)
        if known is not None and config.cache_teacher and config.compares:
            key = {"teacher": known.fingerprint, "precision": config.precision}
            with self.step.autocast():
                self.step.answers = teacher_logits(
                    folder, known.model, self.train_set, key, keep=team.rank == 0
                )
        self.budget = Budget.of(config, reference, self.validation)
        images = min(config.batch_size, len(self.train_set))
        images += 0 if self.proxies is None else config.proxy_count(images)
        self.need = StepMemory.of(self.step, self.train_set, images)
        self.need.check()
        self.frozen: tuple[bool, ...] | None = None  # what was in the last epoch
        self.stream = torch.cuda.Stream(device) if config.cuda_graph else None
        self.do_step = Captured(self.step) if config.cuda_graph else self.step

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on. Generators and the learning rate are functions of
        seed, epoch and step, so the numbers are enough."""
        return {
            "config": self.config.to_dict(),
            "shape": self.shape,
            "teacher": self.teacher_id,
            "epoch": self.epoch,
            **self._learned(),
            "rows": self.rows,
            "budget": None if self.budget is None else self.budget.state(),
            "kept": self.kept,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._load_learned(state)
        self.epoch, self.rows, self.kept = state["epoch"], state["rows"], state.get("kept")
        if self.budget is not None:
            self.budget.load(state["budget"])
            self.objective.weaken(self.budget.weaker)

    def _learned(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
        }

    def _load_learned(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer(self.step.optimizer, state["optimizer"])
        self.step.scaler.load_state_dict(state.get("scaler", {}))

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch, validate, and return its row of ``metrics.csv``. A budget can take
        back the last ones: ``epoch`` is an earlier one then."""
        start = time.perf_counter()
        config, epoch = self.config, self.epoch + 1
        if self.budget is not None and self.epoch >= config.rewound_epoch and self.kept is None:
            self.kept = deepcopy({"epoch": self.epoch, **self._learned(), "inside": None})
        self._freeze(epoch)
        seed = derived_seed(config.seed, "epoch", epoch)
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            own_stream(self.stream),
            self.step.modes(),
        ):
            torch.manual_seed(seed + self.team.rank)  # dropout
            sums, waited = self._steps(epoch, Generator().manual_seed(seed))
            loss, ce, divergence, astray, misled = sums.tolist()
        self.team.average_batchnorm(self.model)
        seconds = time.perf_counter() - start
        logits = self._validate(epoch, self.steps)
        row = {
            "epoch": epoch,
            "loss": loss,
            "ce": ce,
            "divergence": divergence if config.compares else None,
            **self._validated(logits),
            "lr": config.learning_rate(epoch * self.steps - 1, self.steps),
            "ms_per_step": 1000 * seconds / self.steps,
            "waiting": waited / seconds,
            "seconds": time.perf_counter() - start,
        }
        if config.misdirect:
            row |= {"misdirection": astray, "misled": misled}
        self.epoch = epoch
        self.rows.append(row)
        if self.budget is not None and self.kept is not None:
            self._keep_inside(self.budget, self.kept)
            row["seconds"] = time.perf_counter() - start
        return row

    def measure_untrained(self) -> None:
        """A row for weights that are taken as they are."""
        start, logits = time.perf_counter(), self._validate(0, 0)
        row = {"epoch": 0, "loss": None, "ce": None, "divergence": None, **self._validated(logits)}
        row |= {"lr": None, "ms_per_step": 0.0, "waiting": 0.0}
        self.rows.append(row | {"seconds": time.perf_counter() - start})

    def _validated(self, logits: Tensor) -> dict[str, float]:
        """What logits of the validation images say of the model."""
        return {
            "validation_accuracy": accuracy(logits, self.validation.labels),
            "top_probability": mean_top_probability(softmax(logits)),
        }

    def _keep_inside(self, budget: Budget, kept: dict[str, Any]) -> None:
        """Note a network that is inside; after the last epoch go back to it, or if there is none
        begin the last third again."""
        if self.team.broadcast(budget.allows(self.rows[-1]["validation_accuracy"])):
            kept["inside"] = deepcopy({"epoch": self.epoch, "model": self.model.state_dict()})
        if self.epoch < self.config.epochs:
            return
        inside, first = kept["inside"], kept["epoch"]
        if inside is None and budget.patient:
            lost = sum(row["seconds"] for row in self.rows[first:])
            budget.give_up(self._measure(self.epoch), lost)
            self._load_learned(deepcopy(kept))
            self.objective.weaken(budget.weaker)
            self.epoch, self.rows, self.frozen = first, self.rows[:first], None
            return
        if inside is not None:
            self.model.load_state_dict(inside["model"])
        chosen = self.epoch if inside is None else inside["epoch"]
        budget.settle(self.model, partial(self._measure, chosen))
        self.kept = None

    def _validate(self, epoch: int, step: int) -> Tensor:
        """The logits of the validation images, after ``step`` of ``epoch``; leaves eval mode on."""
        try:
            return predict(self.model.eval(), self.validation)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"epoch {epoch}, step {step}: the weights gave NaN or Inf on the validation "
                "images; try a smaller lr or grad_clip"
            ) from error

    def _measure(self, epoch: int) -> dict[str, float]:
        """What a budget weighs; every process finds the same."""
        logits = self._validate(epoch, self.steps)
        found = {"epoch": epoch, "validation_accuracy": accuracy(logits, self.validation.labels)}
        if self.proxies is not None:
            train_set = replace(self.train_set, labels=self.step.labels)  # type: ignore[type-var]
            found["misled"] = self.step.misled(self.proxies.sample(train_set))
        return self.team.broadcast(found)

    def _freeze(self, epoch: int) -> None:
        """Freeze what is frozen from ``epoch`` on."""
        frozen = tuple(self.config.frozen(what, epoch) for what in ("observers", "batchnorm"))
        if frozen[0]:
            freeze_observers(self.model)
        if frozen[1]:
            freeze_batchnorm(self.model)
        if frozen != self.frozen and isinstance(self.do_step, Captured):
            self.do_step.reset()
        self.frozen = frozen

    def _steps(self, epoch: int, generator: Generator) -> tuple[Tensor, float]:
        """All steps of an epoch: means of loss, cross-entropy and divergence, of misdirection loss
        and misled answers, float64 [5], and the seconds that the host waited for images."""
        config = self.config
        shift = partial(augment, pad=config.pad, flip=config.flip)
        loader = batches(
            self.train_set,
            config.batch_size,
            generator=generator,
            augment=shift if config.pad or config.flip else None,
            drop_last=self.drop_last,
            shard=(self.team.rank, self.team.size),
        )
        # Read once per epoch: a number on the host would make every step wait for the device.
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        count = proxies = 0
        if self.proxies is not None:
            self.proxies.start(epoch)
        finite: list[Tensor] = []
        done = (epoch - 1) * self.steps
        if self.team.rank == 0:
            name = f"epoch {epoch}/{config.epochs}"
            loader = progress(loader, name, total=self.steps, unit="step")
        waited, ready = 0.0, time.perf_counter()
        for step, (images, index) in enumerate(loader, start=1):
            waited += time.perf_counter() - ready
            total = min(config.batch_size, len(self.train_set) - count)
            lr = config.learning_rate(done + step - 1, self.steps)
            set_learning_rate(self.step.optimizer, lr)
            self.objective.start_step(done + step - 1)
            inputs = [images, index]
            if self.proxies is not None:
                count_proxies = config.proxy_count(total)
                inputs.append(self.proxies(images, self.step.labels[index], count_proxies))
                proxies += count_proxies
            if step == 1 and self.delayed:
                parts = self.step.parts(*inputs, total=total)
                observe_first(self.model, (part.images for part in parts))
            with self.need.explained():
                result = self.do_step(*inputs, total=total)
            sums += result[:5]
            finite.append(result[5:].clone())
            count += total
            if step % CHECK_EVERY == 0 or step == self.steps:
                # Of all processes: they stop together, with one error, and nobody waits.
                check_finite(self.team.reduce(torch.stack(finite), "MIN"), epoch, step)
                finite.clear()
            ready = time.perf_counter()
        sums = self.team.reduce(sums)
        return torch.cat([sums[:3] / count, sums[3:] / max(1, proxies)]), waited
