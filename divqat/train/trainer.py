"""The state of a training, and its epochs."""

from __future__ import annotations

import time
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
from divqat.quantize import observe_first
from divqat.quantize.rectify import unrectified
from divqat.train.answers import teacher_logits
from divqat.train.budget import Budget, load_reference
from divqat.train.calibration import CalibrationStep, freeze
from divqat.train.config import TrainConfig
from divqat.train.distributed import World
from divqat.train.folder import Run
from divqat.train.graph import GraphedCallable, on_stream
from divqat.train.members import load_members
from divqat.train.memory import StepMemory
from divqat.train.network import build_initial_model, shape_of
from divqat.train.objective import Objective, build_thief
from divqat.train.proxies import Proxies, fit_misdirection
from divqat.train.step import Step, check_finite

CHECK_EVERY = 50  # steps between checks for NaN and Inf


class Trainer:
    """Model, optimizer and metrics, after ``epoch`` epochs the same in all processes.

    Args:
        config: the settings. splits: the data. teacher: None for methods without one.
        world: this process among all. folder: the run folder, for the teacher's cached logits.
    """

    def __init__(
        self, config: TrainConfig, splits: Splits, teacher: Run | None, world: World, folder: Path
    ) -> None:
        device = world.device
        reset_peak(device)
        self.config, self.world, self.device = config, world, device
        self.delayed = config.uses_delayed_ranges(world.size)
        self.epoch, self.rows = 0, list[dict[str, Any]]()
        train_set = splits.train.to(device)
        # Labels are replaced by image indices, which also address the teacher's cached logits.
        index = torch.arange(len(train_set), device=device)
        self.train_set = replace(train_set, labels=index)  # type: ignore[type-var]
        self.validation, self.shape = splits.validation, shape_of(splits)
        if teacher is not None and teacher.shape != self.shape:
            raise ValueError(
                f"teacher: wanted a model for {self.shape}, as the data, got {teacher.shape}"
            )
        teacher_model = None if teacher is None else teacher.model
        self.model = build_initial_model(config, self.shape, teacher_model, world)
        load_members(self.model, config, self.shape)
        self.steps, self.drop_last = steps_per_epoch(len(self.train_set), config.batch_size)
        self.teacher_id = None if teacher is None else teacher.fingerprint
        misdirection: MisdirectionLoss | None = None
        if config.misdirect:
            misdirection = fit_misdirection(config, config.seed, splits.num_classes, train_set)
        self.proxies: Proxies | None = None
        if config.uses_proxies:
            self.proxies = Proxies.from_settings(
                config, config, config.seed, misdirection, train_set, world
            )
        reference = load_reference(config, teacher)
        target = reference if config.distill else teacher  # whose answers the divergence compares
        target_model: nn.Module | None = None  # not needed with λ = 0 and a decoy
        asked = misdirection is not None and misdirection.targets.needs_teacher
        if target is not None and (config.has_divergence or asked):
            target_model = target.model.requires_grad_(False)
            target_model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters, warmup = list(self.model.parameters()), round(config.warmup_epochs * self.steps)
        thief = build_thief(config, config.model, config.seed, self.shape, device)
        self.objective = Objective(config, config, world, parameters, warmup, misdirection, thief)
        make, labels = CalibrationStep if config.method == "ptq" else Step, train_set.labels
        self.step = make(self.model, target_model, labels, world, self.objective, config, config)
        if target is not None and config.cache_teacher and config.has_divergence:
            key = {"teacher": target.fingerprint, "precision": config.precision}
            with self.step.autocast():
                self.step.cached_logits = teacher_logits(
                    folder, target.model, self.train_set, key, keep=world.rank == 0
                )
        self.budget = Budget.from_config(config, reference, self.validation)
        images = min(config.batch_size, len(self.train_set))
        images += 0 if self.proxies is None else config.proxy_count(images)
        self.memory = StepMemory.measure(self.step, self.train_set, images)
        self.memory.check()
        self.frozen: tuple[bool, ...] | None = None  # observers, BatchNorm; in the last epoch
        self.stream = torch.cuda.Stream(device) if config.cuda_graph else None
        self.run_step = GraphedCallable(self.step) if config.cuda_graph else self.step

    def state(self) -> dict[str, Any]:
        """The checkpoint: all that the next epoch depends on. Random numbers and the learning rate
        are functions of seed, epoch and step."""
        return {
            "config": self.config.to_dict(),
            "shape": self.shape,
            "teacher": self.teacher_id,
            "epoch": self.epoch,
            **self._learned_state(),
            "rows": self.rows,
            "budget": None if self.budget is None else self.budget.state(),
            "kept": None if self.budget is None else self.budget.kept,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state`."""
        self._load_learned_state(state)
        self.epoch, self.rows = state["epoch"], state["rows"]
        if self.budget is not None:
            self.budget.load(state["budget"])
            self.budget.kept = state.get("kept")
            self.objective.set_strength(self.budget.strength)

    def _learned_state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), **self.step.state()}

    def _load_learned_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.step.load(state)

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch, validate, and return its row of ``metrics.csv``. A budget may rewind the
        training; then ``self.epoch`` is smaller than before."""
        start = time.perf_counter()
        config, epoch = self.config, self.epoch + 1
        in_last_third = self.epoch >= config.rewind_epoch
        if self.budget is not None and in_last_third and self.budget.kept is None:
            self.budget.begin({"epoch": self.epoch, **self._learned_state()})
        self._freeze(epoch)
        seed = derived_seed(config.seed, "epoch", epoch)
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            on_stream(self.stream),
            self.step.training_mode(),
        ):
            torch.manual_seed(seed + self.world.rank)  # dropout
            sums, waited = self._run_steps(epoch, Generator().manual_seed(seed))
            loss, ce, divergence, misdirection, misled = sums.tolist()
        self.world.average_batchnorm(self.model)
        seconds = time.perf_counter() - start
        logits = self._validation_logits(epoch, self.steps)
        row = {
            "epoch": epoch,
            "loss": loss,
            "ce": ce,
            "divergence": divergence if config.has_divergence else None,
            **self._validation_metrics(logits),
            "lr": config.learning_rate(epoch * self.steps - 1, self.steps),
            "ms_per_step": 1000 * seconds / self.steps,
            "waiting": waited / seconds,
            "seconds": time.perf_counter() - start,
        }
        if config.misdirect:
            row |= {"misdirection": misdirection, "misled": misled}
        self.epoch = epoch
        self.rows.append(row)
        if self.budget is not None and self.budget.kept is not None:
            self._apply_budget(self.budget, self.budget.kept["epoch"])
            row["seconds"] = time.perf_counter() - start
        return row

    def measure_untrained(self) -> None:
        """Add a row of metrics for weights that are used without training."""
        start, logits = time.perf_counter(), self._validation_logits(0, 0)
        row: dict[str, Any] = {"epoch": 0, "loss": None, "ce": None, "divergence": None}
        row |= self._validation_metrics(logits)
        row |= {"lr": None, "ms_per_step": 0.0, "waiting": 0.0}
        self.rows.append(row | {"seconds": time.perf_counter() - start})

    def _validation_metrics(self, logits: Tensor) -> dict[str, float]:
        """Metrics from the logits of the validation images."""
        return {
            "validation_accuracy": accuracy(logits, self.validation.labels),
            "top_probability": mean_top_probability(softmax(logits)),
        }

    def _apply_budget(self, budget: Budget, first: int) -> None:
        """Remember a network within the budget. After the last epoch return to the last of them; if
        there is none, rewind to after epoch ``first``, or when that is used up, interpolate."""
        if self.world.broadcast(budget.allows(self.rows[-1]["validation_accuracy"])):
            budget.keep(self.model, self.epoch)
        if self.epoch < self.config.epochs:
            return
        if self.config.rejects:
            with unrectified(self.model):
                logits = self._validation_logits(self.epoch, self.steps)
            threshold = budget.largest_threshold(logits, self.validation.labels)
            if budget.spend_on_threshold(self.model, self.world.broadcast(threshold)):
                budget.keep(self.model, self.epoch)
        seconds = sum(row["seconds"] for row in self.rows[first:])
        state = budget.end(self.model, self.epoch, self._measure_for_budget, seconds=seconds)
        if state is not None:
            self._load_learned_state(state)
            self.objective.set_strength(budget.strength)
            self.epoch, self.rows, self.frozen = first, self.rows[:first], None

    def _validation_logits(self, epoch: int, step: int) -> Tensor:
        """Logits of the validation images after ``step`` of ``epoch``; sets eval mode."""
        try:
            return predict(self.model.eval(), self.validation)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"epoch {epoch}, step {step}: the model gives NaN or Inf on the validation "
                "images; try a smaller lr or grad_clip"
            ) from error

    def _measure_for_budget(self, epoch: int) -> dict[str, float]:
        """What a budget records of the model; the same in every process."""
        logits = self._validation_logits(epoch, self.steps)
        measured = {"epoch": epoch, "validation_accuracy": accuracy(logits, self.validation.labels)}
        if self.proxies is not None:
            train_set = replace(self.train_set, labels=self.step.labels)  # type: ignore[type-var]
            measured["misled"] = self.step.misled_share(self.proxies.sample(train_set))
        return self.world.broadcast(measured)

    def _freeze(self, epoch: int) -> None:
        """Freeze observers and BatchNorm if they are frozen in ``epoch``."""
        frozen = freeze(self.model, self.config, epoch)
        if frozen != self.frozen and isinstance(self.run_step, GraphedCallable):
            self.run_step.reset()
        self.frozen = frozen

    def _run_steps(self, epoch: int, generator: Generator) -> tuple[Tensor, float]:
        """Run the steps of an epoch. Returns the means of loss, cross-entropy, divergence,
        misdirection loss and misled answers, float64 [5], and the seconds of waiting for images."""
        config = self.config
        augmentation = partial(augment, pad=config.pad, flip=config.flip)
        loader = batches(
            self.train_set,
            config.batch_size,
            generator=generator,
            augment=augmentation if config.pad or config.flip else None,
            drop_last=self.drop_last,
            shard=(self.world.rank, self.world.size),
        )
        # Read on the host once per epoch; every read makes the host wait for the device.
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        count, proxies, finite = 0, 0, list[Tensor]()
        if self.proxies is not None:
            self.proxies.start(epoch)
        if self.world.rank == 0:
            name = f"epoch {epoch}/{config.epochs}"
            loader = progress(loader, name, total=self.steps, unit="step")
        waited, ready = 0.0, time.perf_counter()
        for step, (images, index) in enumerate(loader, start=1):
            waited += time.perf_counter() - ready
            total = min(config.batch_size, len(self.train_set) - count)
            number = (epoch - 1) * self.steps + step - 1  # of the step, over the whole training
            lr = config.learning_rate(number, self.steps)
            self.step.start(number, lr, lr / config.lr)
            inputs = [images, index]
            if self.proxies is not None:
                count_proxies = config.proxy_count(total)
                inputs.append(self.proxies(images, self.step.labels[index], count_proxies))
                proxies += count_proxies
            if step == 1 and self.delayed:
                parts = self.step.micro_batches(*inputs, total=total)
                observe_first(self.model, (part.images for part in parts))
            with self.memory.explain_errors():
                result = self.run_step(*inputs, total=total)
            sums += result[:5]
            finite.append(result[5:].clone())
            count += total
            if step % CHECK_EVERY == 0 or step == self.steps:
                # Reduced over all processes, so that all stop with the same error.
                check_finite(self.world.reduce(torch.stack(finite), "MIN"), epoch, step)
                finite.clear()
            ready = time.perf_counter()
        sums = self.world.reduce(sums)
        return torch.cat([sums[:3] / count, sums[3:] / max(1, proxies)]), waited
