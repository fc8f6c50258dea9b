"""What one training holds and does epoch by epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from divqat.data import ImageSet, Splits, augment, batches
from divqat.evaluate import accuracy, mean_top_probability, predict, softmax
from divqat.evaluate.result import hardware, versions
from divqat.nn import DivQATLoss, FakeQuantize
from divqat.progress import progress
from divqat.quantize import freeze_batchnorm, freeze_observers, observe_first
from divqat.train.config import LOSS, TrainConfig
from divqat.train.distributed import Part, Team
from divqat.train.folder import Run, build_model, derived_seed

CHECK_EVERY = 50  # steps between two looks at whether all numbers are finite


class Trainer:
    """Model, optimizer and what has been measured; ``epoch`` is the number of epochs done.

    After an epoch every process of the team holds the same.
    """

    def __init__(
        self, config: TrainConfig, splits: Splits, teacher: Run | None, team: Team
    ) -> None:
        device = team.device
        self.config, self.team, self.device = config, team, device
        self.delayed = config.delayed(team.size)
        self.epoch, self.rows = 0, list[dict[str, Any]]()
        self.train_set = ImageSet(splits.train.images.to(device), splits.train.labels.to(device))
        self.validation = splits.validation
        self.shape = {
            "in_channels": splits.channels,
            "num_classes": splits.num_classes,
            "image_size": list(splits.image_size),
        }
        if teacher is not None and teacher.shape != self.shape:
            raise ValueError(
                f"teacher: wanted a model of {self.shape} like the data, got {teacher.shape}"
            )
        self.model = build_model(config, self.shape)
        if teacher is not None:
            self.model.load_state_dict(teacher.model.state_dict())
        # Channels last: convolutions and batch norms are faster so on CPUs and on tensor cores.
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.delayed:
            for module in self.model.modules():
                if isinstance(module, FakeQuantize):
                    module.mode = "delayed"
        self.parallel = team.wrap(self.model)
        self.teacher_id = None if teacher is None else teacher.fingerprint
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        # Batch norm cannot train on a single image.
        n, size = len(self.train_set), config.batch_size
        self.drop_last = n > size and n % size == 1
        self.steps = n // size if self.drop_last else -(-n // size)
        self.loss: DivQATLoss | None = None
        self.teacher: nn.Module | None = None
        if config.method == "divqat":
            settings = {name: getattr(config, name) for name in LOSS if name != "warmup_epochs"}
            self.loss = DivQATLoss(
                **settings,
                warmup_steps=round(config.warmup_epochs * self.steps),
                label_smoothing=config.label_smoothing,
            ).to(device)
            if config.weight and teacher is not None:  # λ = 0 is plain QAT and asks no teacher
                teacher.model.requires_grad_(False)
                self.teacher = teacher.model.to(  # type: ignore[call-overload]
                    device, memory_format=torch.channels_last
                )

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on. Generators and the learning rate are functions of
        seed, epoch and step, so the numbers are enough."""
        return {
            "config": self.config.to_dict(),
            "shape": self.shape,
            "teacher": self.teacher_id,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.rows = state["epoch"], state["rows"]

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch, validate, and return its row of ``metrics.csv``."""
        start = time.perf_counter()
        config, epoch = self.config, self.epoch + 1
        if config.frozen("observers", epoch):
            freeze_observers(self.model)
        if config.frozen("batchnorm", epoch) and config.method != "fp":
            freeze_batchnorm(self.model)
        seed = derived_seed(config.seed, "epoch", epoch)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed + self.team.rank)  # dropout
            loss, ce, divergence = self._steps(epoch, Generator().manual_seed(seed)).tolist()
        self.team.average_batchnorm(self.model)
        seconds = time.perf_counter() - start
        try:
            logits = predict(self.model.eval(), self.validation.images)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"epoch {epoch}, step {self.steps}: the weights gave NaN or Inf on the validation "
                "images; try a smaller lr or grad_clip"
            ) from error
        row = {
            "epoch": epoch,
            "loss": loss,
            "ce": ce,
            "divergence": divergence if self.teacher is not None else None,
            "validation_accuracy": accuracy(logits, self.validation.labels),
            "top_probability": mean_top_probability(softmax(logits)),
            "lr": config.learning_rate(epoch * self.steps - 1, self.steps),
            "ms_per_step": 1000 * seconds / self.steps,
            "seconds": time.perf_counter() - start,
        }
        self.epoch = epoch
        self.rows.append(row)
        return row

    def _steps(self, epoch: int, generator: Generator) -> Tensor:  # [3]: loss, CE, divergence
        self.model.train()
        config = self.config
        shift = partial(augment, pad=config.pad, flip=config.flip)
        loader = batches(
            self.train_set,
            config.batch_size,
            generator=generator,
            augment=shift if config.pad or config.flip else None,
            drop_last=self.drop_last,
        )
        # Read once per epoch: a number on the host would make every step wait for the device.
        sums, count = torch.zeros(3, dtype=torch.float64, device=self.device), 0
        finite: list[Tensor] = []
        done = (epoch - 1) * self.steps
        if self.team.rank == 0:
            name = f"epoch {epoch}/{config.epochs}"
            loader = progress(loader, name, total=self.steps, unit="step")
        for step, batch in enumerate(loader, start=1):
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate(done + step - 1, self.steps)
            if step == 1 and self.delayed:
                observe_first(self.model, (part.images for part in self._parts(*batch)))
            self.optimizer.zero_grad()
            finite.append(torch.ones(3, dtype=torch.bool, device=self.device))
            for part in self._parts(*batch):
                images = part.images.contiguous(memory_format=torch.channels_last)
                logits = self.parallel(images)
                loss, ce, divergence = self._loss(logits, part.labels, images, done + step - 1)
                (loss * part.weight).backward()
                sums += part.count * torch.stack([loss.detach(), ce, divergence])
                finite[-1] &= torch.stack(
                    [t.detach().isfinite().all() for t in (images, logits, loss)]
                )
            count += len(batch[1])
            if config.grad_clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            self.optimizer.step()
            if step % CHECK_EVERY == 0 or step == self.steps:
                # Of all processes: they stop together, with one error, and nobody waits.
                _check_finite(self.team.reduce(torch.stack(finite).byte(), "MIN"), epoch, step)
                finite.clear()
        return self.team.reduce(sums) / count

    def _parts(self, images: Tensor, labels: Tensor) -> Iterator[Part]:
        return self.team.parts(self.parallel, images, labels, self.config.accumulate)

    def _loss(
        self, logits: Tensor, labels: Tensor, images: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross-entropy and divergence of a batch, each []; only the first has a gradient."""
        if self.loss is None:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            return loss, loss.detach(), torch.zeros_like(loss)
        answers = None
        if self.teacher is not None:
            # Not inference_mode: the backward pass keeps the teacher's logits.
            with torch.no_grad():
                answers = self.teacher(images)
        self.loss.steps.fill_(step)
        loss = self.loss(logits, labels, answers)
        assert self.loss.ce is not None and self.loss.divergence is not None
        return loss, self.loss.ce, self.loss.divergence

    def summary(self, splits: Splits) -> dict[str, Any]:
        """The content of ``summary.json``; looks at the test set."""
        config, last = self.config, self.rows[-1]
        logits = predict(self.model.eval(), splits.test.images)
        return {
            "method": config.method,
            "dataset": config.dataset,
            "model": config.model,
            "seed": config.seed,
            "epochs": config.epochs,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "validation_accuracy": last["validation_accuracy"],
            "test_accuracy": accuracy(logits, splits.test.labels),
            "test_top_probability": mean_top_probability(softmax(logits)),
            "seconds": sum(row["seconds"] for row in self.rows),
            "versions": versions(),
            "hardware": hardware(),
        }


def _check_finite(finite: Tensor, epoch: int, last_step: int) -> None:
    """Raise for the first row of ``finite`` (uint8 [steps, 3]: images, logits, loss) with a 0;
    the last row is of ``last_step``."""
    finite = finite.bool()
    if finite.all():
        return
    row = int((~finite).any(1).int().argmax())
    causes = (
        "the input images hold NaN or Inf",
        "the model's logits became NaN or Inf; try a smaller lr or grad_clip",
        "the loss became NaN or Inf though the logits are finite; "
        "try a smaller weight, or bound, or grad_clip",
    )
    cause = causes[int((~finite[row]).int().argmax())]
    raise FloatingPointError(f"epoch {epoch}, step {last_step - len(finite) + 1 + row}: {cause}")
