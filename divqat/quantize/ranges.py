"""The ranges of all observers of a model at once: several processes observe as if they were one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from torch import distributed as dist

from divqat.nn.fake_quantize import FakeQuantize
from divqat.nn.observer import MovingAverageMinMaxObserver
from divqat.nn.spec import QuantSpec


def sync_observers(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every process the activation ranges that one process with all their images would have.

    For a training loop of your own, after each forward pass (the backward may come before or
    after). One all-reduce of two float32 per observed scale serves the whole model, and one call
    of the ``observe`` op per grid derives scales and zero points; the host does not wait.

    Bit for bit: running + c · (batch − running) does not fall when batch rises, rounding included,
    so the largest of the processes' running maxima is the one of the largest batch maximum; minima
    likewise. It holds where

    * the processes had the same ranges before, and each has run the model once since then, on at
      least one image;
    * quantizers do not use a range before it is synchronised, which ``mode="delayed"`` says; with
      ``"exact"`` each process quantizes its images with its own range and only then agrees;
    * the ranges had seen a batch: :func:`observe_first` makes them see one;
    * there is no NaN or Inf: a process that meets one keeps its range, the others go on.

    Set ``broadcast_buffers = False`` on the ``DistributedDataParallel``, or it broadcasts all
    buffers as well before each forward. A learned scale (``LearnedStepFakeQuantize``) is a
    parameter, which needs no more than to have seen a batch before the model is wrapped.

    Args:
        model: prepared; observers that are disabled are left out, and if all are, nothing is sent.
        group: the processes; None: all. Every one of them has to call this.

    Raises:
        ValueError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: wanted an initialized torch.distributed, got none")
    ranges = Ranges(model)
    if ranges:
        merged = ranges.read()
        dist.all_reduce(merged, dist.ReduceOp.MAX, group)
        ranges.write(merged)


@torch.no_grad()
def observe_first(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Let the quantizers that have seen nothing observe ``batches``, and quantize no activation.

    The rest of the model is in eval mode meanwhile: BatchNorm neither uses nor moves its batch
    statistics, so that a part of a batch has the ranges that it has within the whole. Nothing is
    run where every quantizer has seen a batch. Several processes call :func:`sync_observers` next.

    Args:
        model: prepared; its modes are as before afterwards.
        batches: what the model takes, [N, …] each.
    """
    if not all(map(_calibrated, _quantizers(model))):
        with observing(model, fresh=True):
            for images in batches:
                model(images)


@contextmanager
def observing(model: nn.Module, *, fresh: bool = False) -> Iterator[None]:
    """A block in which quantizers observe and quantize no activation, and all else is in eval mode.

    Weights are quantized and BatchNorms folded as they are deployed: post-training quantization is
    this block around a pass over training images. A learned scale does not move.

    Args:
        model: prepared; its modes are as before afterwards.
        fresh: only quantizers that have seen nothing observe; the others quantize as in eval mode.
    """
    training = {module: module.training for module in model.modules()}
    observers = [q for q in _quantizers(model) if not (fresh and _calibrated(q))]
    enabled = [quantizer.fake_quant_enabled for quantizer in observers]
    model.eval()
    try:
        for quantizer in observers:
            quantizer.train().fake_quant_enabled = False
        yield
    finally:
        for quantizer, quantizes in zip(observers, enabled, strict=True):
            quantizer.fake_quant_enabled = quantizes
        for module, mode in training.items():
            module.training = mode


def _calibrated(quantizer: FakeQuantize) -> bool:
    """Without waiting for a GPU, unless it is a copy that was made before the first batch."""
    return quantizer.calibrated or quantizer.has_range()


def _quantizers(model: nn.Module) -> list[FakeQuantize]:
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


class Ranges:
    """The running ranges of a model's enabled observers, as one vector; false if there are none.

    The vector is float32 [2K], K the number of scales: −running_min, then running_max. Of ranges
    that grew out of the same one, the maximum is the one that saw all their images.
    """

    def __init__(self, model: nn.Module) -> None:
        observers = (m for m in model.modules() if isinstance(m, MovingAverageMinMaxObserver))
        # Those of one grid side by side, in an order that is the same in every process.
        self.observers = sorted((o for o in observers if o.observer_enabled), key=_grid)

    def __bool__(self) -> bool:
        return bool(self.observers)

    def _buffers(self, name: str) -> list[Tensor]:  # [n] each, views
        return [getattr(observer, name).view(-1) for observer in self.observers]

    def read(self) -> Tensor:
        """The vector, a copy."""
        low, high = torch.cat(self._buffers("running_min")), torch.cat(self._buffers("running_max"))
        return torch.cat([-low, high])

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the ranges, and scales and zero points as the ``observe`` op derives them."""
        low, high = vector.chunk(2)
        low = -low
        scale, zero_point = (torch.cat(self._buffers(name)) for name in ("scale", "zero_point"))
        start = 0
        for grid, members in groupby(self.observers, key=_grid):
            part = slice(start, start + sum(o.scale.numel() for o in members))
            start = part.stop
            # To the op, a batch of two rows and a first one: its range is what it is. What has
            # seen nothing, +Inf and −Inf, is a batch that leaves everything as it was.
            rows = torch.stack([low[part], high[part]])
            ends = torch.full_like(rows[0], torch.inf), torch.full_like(rows[0], -torch.inf)
            qparams = scale[part], zero_point[part]
            torch.ops.divqat.observe(rows, *ends, *qparams, *grid[:2], 1, 1.0, grid[2], False)
        sizes = [observer.scale.numel() for observer in self.observers]
        for name, value in (
            ("running_min", low),
            ("running_max", high),
            ("scale", scale),
            ("zero_point", zero_point),
        ):
            torch._foreach_copy_(self._buffers(name), value.split(sizes))


def _grid(observer: MovingAverageMinMaxObserver) -> tuple[int, int, bool]:
    spec: QuantSpec = observer.spec
    return spec.quant_min, spec.quant_max, spec.symmetric
