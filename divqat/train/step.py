"""One optimizer step, as a function of tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from divqat.quantize import save_as_codes
from divqat.train.distributed import MicroBatch, World
from divqat.train.objective import Objective
from divqat.train.optimizer import build_optimizer, load_optimizer, set_learning_rate
from divqat.train.settings import OptimizerSettings, RunningSettings


class Step:
    """Forward, loss, backward and update.

    There is no host sync, and everything that changes from step to step is in tensors with fixed
    addresses, so that a CUDA graph can capture the whole step.

    Args:
        model: trained in place.
        teacher: the network whose answers the loss uses, if any; with ``distill`` the reference.
            For training images it is not run if ``cached_logits`` is set.
        labels: int64 [number of training images], on the device.
        world: the processes that share the step.
        objective: the loss.
        running, optimizer: the settings.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        labels: Tensor,
        world: World,
        objective: Objective,
        running: RunningSettings,
        optimizer: OptimizerSettings,
    ) -> None:
        self.running, self.model, self.world = running, model, world
        self.accumulate, self.grad_clip = optimizer.accumulate, optimizer.grad_clip
        self.labels, self.objective = labels, objective
        self.cached_logits: Tensor | None = None  # float32 [number of training images, num_classes]
        self.teacher: Callable[[Tensor], Tensor] | None = teacher
        self.net = model
        if running.compile:
            self.net = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
            if teacher is not None:
                self.teacher = torch.compile(teacher, fullgraph=True, dynamic=False)
        self.net = world.wrap(self.net)
        # Without loss scaling, small gradients underflow in float16.
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=running.precision == "float16"
        )
        self.optimizer = build_optimizer(optimizer, model.parameters(), world.device)

    def state(self) -> dict[str, Any]:
        """What steps change, besides the model."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {**state, **self.objective.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state`, which may hold other keys, too."""
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.objective.load(state)

    def start(self, number: int, lr: float, share: float) -> None:
        """Prepare step ``number``, counted from 0 over the whole training, with the learning rate
        ``lr``, which is ``share`` of its peak."""
        set_learning_rate(self.optimizer, lr)
        self.objective.start_step(number, share)

    def autocast(self) -> AbstractContextManager[None]:
        """A context that runs in the chosen precision."""
        dtype = getattr(torch, self.running.precision)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def _save_as_codes(self) -> AbstractContextManager[None]:
        return save_as_codes(self.model) if self.running.save_as_codes else nullcontext()

    def training_mode(self) -> AbstractContextManager[None]:
        """A context in which the model is in the mode that the steps need."""
        self.model.train()
        return nullcontext()

    def forward(self, net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Logits, float32 [n, num_classes], of contiguous images [n, C, H, W]."""
        with self.autocast():
            return net(images).float()

    def micro_batches(
        self, images: Tensor, index: Tensor, proxies: Tensor | None = None, *, total: int
    ) -> Iterator[MicroBatch]:
        """The micro-batches of this process, each with its share of the proxies after its training
        images. For the arguments see ``__call__``."""
        micro_batches = self.world.micro_batches(self.net, images, index, total, self.accumulate)
        if proxies is None:
            yield from micro_batches
            return
        proxy_parts = proxies.tensor_split(self.accumulate)
        for micro_batch, part in zip(micro_batches, proxy_parts, strict=True):
            yield replace(micro_batch, images=torch.cat([micro_batch.images, part]))

    def __call__(
        self, images: Tensor, index: Tensor, proxies: Tensor | None = None, *, total: int
    ) -> Tensor:
        """Run the step.

        Proxies and training images share a forward pass, because activation ranges and BatchNorm
        statistics are per batch: ranges observed on one kind alone would clip the other, and the
        deployed network, which cannot tell them apart, has one set of statistics for both.

        Args:
            images: float32 [n, C, H, W], this process's shard.
            index: int64 [n], their positions in the training set.
            proxies: float32 [m, C, H, W], this process's, if the loss needs them.
            total: images of the global batch, without proxies.

        Returns:
            float64 [8]: this process's sums of loss, cross-entropy and divergence over its images,
            its sums of misdirection loss and misled answers over its proxies, and whether images,
            logits and loss were finite (1) or not (0).
        """
        self.optimizer.zero_grad()
        sums = torch.zeros(5, dtype=torch.float64, device=images.device)
        finite = torch.ones(3, dtype=torch.bool, device=images.device)
        for part in self.micro_batches(images, index, proxies, total=total):
            n = len(part.index)
            batch = part.images.contiguous(memory_format=torch.channels_last)
            with self._save_as_codes():
                logits = self.forward(self.net, batch)
            teacher_logits = self._teacher_logits(batch[:n], part.index)
            labels, teacher = self.labels[part.index], self._run_teacher
            objective = self.objective(
                logits, labels, batch, teacher_logits, teacher, part, total, sums
            )
            self.backward(objective)
            finite &= torch.stack([t.detach().isfinite().all() for t in (batch, logits, objective)])
        self.update()
        return torch.cat([sums, finite.double()])

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's share of the loss, []."""
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """Clip the gradient, if ``grad_clip`` is set, and update the weights."""
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.inference_mode()
    def misled_share(self, proxies: Iterable[Tensor]) -> float:
        """The fraction of proxies, in batches of float32 [M, C, H, W], whose answers mislead; the
        model is in eval mode."""
        misdirection = self.objective.misdirection
        assert misdirection is not None
        counts = []
        for images in proxies:
            batch = images.to(self.world.device, memory_format=torch.channels_last)
            needs_teacher = misdirection.targets.needs_teacher
            teacher_logits = self._run_teacher(batch) if needs_teacher else None
            logits = self.forward(self.model, batch)
            terms = misdirection.targets.terms(logits, teacher_logits, batch)
            counts.append((terms.misled, len(images)))
        return float(sum(misled for misled, _ in counts)) / sum(n for _, n in counts)

    def _teacher_logits(self, images: Tensor, index: Tensor) -> Tensor | None:
        """The teacher's logits, float32 [n, num_classes], if the loss has a divergence."""
        if self.cached_logits is not None:
            return self.cached_logits[index]
        if self.teacher is None or not self.objective.settings.has_divergence:
            return None
        return self._run_teacher(images)

    def _run_teacher(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.inference_mode(), self.autocast():
            logits = self.teacher(images)
        return logits.float().clone()  # autograd cannot save an inference tensor


def check_finite(finite: Tensor, epoch: int, last_step: int) -> None:
    """Raise FloatingPointError for the first row of ``finite`` with a 0.

    Args:
        finite: float64 [steps, 3]; 1 if images, logits and loss were finite, else 0.
        last_step: the step of the last row.
    """
    finite = finite.bool()
    if finite.all():
        return
    row = int((~finite).any(1).int().argmax())
    causes = (
        "the input images contain NaN or Inf",
        "the model's logits became NaN or Inf; try a smaller lr or grad_clip",
        "the loss became NaN or Inf though the logits are finite; "
        "try a smaller weight, a bound or grad_clip",
    )
    cause = causes[int((~finite[row]).int().argmax())]
    raise FloatingPointError(f"epoch {epoch}, step {last_step - len(finite) + 1 + row}: {cause}")
