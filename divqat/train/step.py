"""One optimizer step, as a function of tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from divqat.quantize import save_as_codes
from divqat.train.distributed import Part, Team
from divqat.train.objective import Objective
from divqat.train.optimizer import build_optimizer
from divqat.train.settings import OptimizerSettings, RunningSettings


class Step:
    """Forward, loss, backward and update.

    Nothing is read on the host, and what changes from step to step is in tensors that keep their
    place, so that a CUDA graph can hold all of it.

    Args:
        model: trained in place.
        teacher: asked for its answers, if the method wants them and none are kept in ``answers``;
            with ``distill`` the reference.
        labels: int64 [number of training images], on the device.
        team: the processes that do the step together.
        objective: the loss.
        running, optimizer: the settings.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        labels: Tensor,
        team: Team,
        objective: Objective,
        running: RunningSettings,
        optimizer: OptimizerSettings,
    ) -> None:
        self.running, self.model, self.team = running, model, team
        self.accumulate, self.grad_clip = optimizer.accumulate, optimizer.grad_clip
        self.labels, self.objective = labels, objective
        self.answers: Tensor | None = None  # float32 [number of images, num_classes], if kept
        self.teacher: Callable[[Tensor], Tensor] | None = teacher
        self.net = model
        if running.compile:
            self.net = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
            if teacher is not None:
                self.teacher = torch.compile(teacher, fullgraph=True, dynamic=False)
        self.net = team.wrap(self.net)
        # Small gradients are 0 in float16 unless the loss is scaled up.
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=running.precision == "float16")
        self.optimizer = build_optimizer(optimizer, model.parameters(), team.device)

    def autocast(self) -> AbstractContextManager[None]:
        """A block that runs in the precision that was asked for."""
        dtype = getattr(torch, self.running.precision)
        return torch.autocast(self.team.device.type, dtype, enabled=dtype != torch.float32)

    def _saving(self) -> AbstractContextManager[None]:
        return save_as_codes(self.model) if self.running.save_as_codes else nullcontext()

    def modes(self) -> AbstractContextManager[None]:
        """A block in which the model's modules are in the modes that the steps want."""
        self.model.train()
        return nullcontext()

    def forward(self, net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Logits of contiguous images [n, C, H, W], float32 [n, num_classes]."""
        with self.autocast():
            return net(images).float()

    def parts(
        self, images: Tensor, index: Tensor, proxies: Tensor | None = None, *, total: int
    ) -> Iterator[Part]:
        """Images in the parts that this process runs one after another, the proxies of each after
        its training images; see __call__."""
        parts = self.team.parts(self.net, images, index, total, self.accumulate)
        if proxies is None:
            yield from parts
            return
        for part, own in zip(parts, proxies.tensor_split(self.accumulate), strict=True):
            yield replace(part, images=torch.cat([part.images, own]))

    def __call__(
        self, images: Tensor, index: Tensor, proxies: Tensor | None = None, *, total: int
    ) -> Tensor:
        """Do the step.

        Proxies run in one batch with the training images, because an activation range and a
        BatchNorm have one batch each: a range observed apart would clip the others, and
        statistics of either alone are not those that the deployed network, which cannot know
        what it is asked, will use.

        Args:
            images: float32 [n, C, H, W], this process's own. index: int64 [n], which ones they are.
            proxies: float32 [m, C, H, W], its own, where the loss wants some.
            total: images of the whole batch, without proxies.

        Returns:
            float64 [8]: this process's sums over its images of loss, cross-entropy and divergence,
            over its proxies of misdirection loss and misled answers, and whether (1) or not (0)
            images, logits and loss were finite.
        """
        self.optimizer.zero_grad()
        sums = torch.zeros(5, dtype=torch.float64, device=images.device)
        finite = torch.ones(3, dtype=torch.bool, device=images.device)
        for part in self.parts(images, index, proxies, total=total):
            n = len(part.index)
            batch = part.images.contiguous(memory_format=torch.channels_last)
            with self._saving():
                logits = self.forward(self.net, batch)
            labels, answers = self.labels[part.index], self._answers(batch[:n], part.index)
            objective = self.objective(logits, labels, batch, answers, self._ask, part, total, sums)
            self.backward(objective)
            finite &= torch.stack([t.detach().isfinite().all() for t in (batch, logits, objective)])
        self.update()
        return torch.cat([sums, finite.double()])

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part's share of the loss, []."""
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """Move the weights by the gradient."""
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.inference_mode()
    def misled(self, parts: Iterable[Tensor]) -> float:
        """The share of proxies, float32 [M, C, H, W] each, that the model, in eval mode, misleads
        about."""
        misdirection = self.objective.misdirection
        assert misdirection is not None
        counts = []
        for images in parts:
            batch = images.to(self.team.device, memory_format=torch.channels_last)
            theirs = self._ask(batch) if misdirection.targets.needs_teacher else None
            logits = self.forward(self.model, batch)
            counts.append((misdirection.targets.terms(logits, theirs, batch).misled, len(images)))
        return float(sum(misled for misled, _ in counts)) / sum(n for _, n in counts)

    def _answers(self, images: Tensor, index: Tensor) -> Tensor | None:
        """The teacher's logits, float32 [n, num_classes], if the loss asks for them."""
        if self.answers is not None:
            return self.answers[index]
        if self.teacher is None or not self.objective.settings.compares:
            return None
        return self._ask(images)

    def _ask(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.inference_mode(), self.autocast():
            logits = self.teacher(images)
        return logits.float().clone()  # the backward pass may not keep an inference tensor


def check_finite(finite: Tensor, epoch: int, last_step: int) -> None:
    """Raise for the first row of ``finite`` (float [steps, 3]: images, logits, loss) with a 0;
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
