"""The ranges of all observers of a model together, to synchronize them across processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from torch import distributed as dist

from divqat._util.modes import modes_kept
from divqat.nn.fake_quantize import FakeQuantize
from divqat.nn.observer import MovingAverageMinMaxObserver
from divqat.nn.spec import QuantSpec


def sync_observers(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every process the activation ranges that one process with all their images would have.

    For your own training loop: call it after each forward pass, before or after the backward. One
    all-reduce of two float32 per observed scale serves the whole model, and one call of the
    ``observe`` op per grid computes scales and zero points, without a host sync.

    The result is exact, bit for bit: running + c · (batch − running) is monotonic in batch,
    including rounding, so the largest running maximum of all processes belongs to the largest batch
    maximum; likewise for minima. The conditions are:

    * All processes had the same ranges before, and each has run the model once since then, on at
      least one image.
    * Quantizers do not use a range before it is synchronized, as with ``mode="delayed"``. With
      ``"exact"`` each process quantizes its images with its own range, and agrees only afterwards.
    * Every range has seen a batch: see :func:`observe_first`.
    * There is no NaN or Inf: a process that meets one keeps its range, the others update theirs.

    Set ``broadcast_buffers = False`` for ``DistributedDataParallel``, which otherwise also
    broadcasts all buffers before each forward. A learned scale (``LearnedStepFakeQuantize``) is a
    parameter: it only has to see a batch before the model is wrapped.

    Args:
        model: a prepared model; disabled observers are left out. If all are disabled, nothing is
            sent.
        group: the processes; None: all. Every one of them has to call this function.

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
    """Let quantizers that have not seen a batch observe ``batches``, without quantization of
    activations.

    Meanwhile the rest of the model is in eval mode: BatchNorm neither uses nor updates batch
    statistics, so that the ranges of a part of a batch do not depend on the rest. If every
    quantizer has seen a batch, nothing is run. Several processes then call :func:`sync_observers`.

    Args:
        model: a prepared model; its training modes are restored.
        batches: inputs of the model, [N, …] each.
    """
    if not all(map(_calibrated, _quantizers(model))):
        with observing(model, fresh=True):
            for images in batches:
                model(images)


@contextmanager
def observing(model: nn.Module, *, fresh: bool = False) -> Iterator[None]:
    """A block in which quantizers observe activations without quantizing them, and everything else
    is in eval mode.

    Weights are quantized and BatchNorms folded as in deployment: for post-training quantization,
    run a calibration set in this block. Learned scales do not change.

    Args:
        model: a prepared model; its training modes are restored.
        fresh: only quantizers that have not seen a batch observe; the others quantize as in eval
            mode.
    """
    observers = [q for q in _quantizers(model) if not (fresh and _calibrated(q))]
    enabled = [quantizer.fake_quant_enabled for quantizer in observers]
    with modes_kept(model):
        model.eval()
        try:
            for quantizer in observers:
                quantizer.train().fake_quant_enabled = False
            yield
        finally:
            for quantizer, quantizes in zip(observers, enabled, strict=True):
                quantizer.fake_quant_enabled = quantizes


def _calibrated(quantizer: FakeQuantize) -> bool:
    """Whether the quantizer has seen a batch. Without a host sync, except for copies made before
    the first batch."""
    return quantizer.calibrated or quantizer.has_range()


def _quantizers(model: nn.Module) -> list[FakeQuantize]:
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


class Ranges:
    """The running ranges of a model's enabled observers as one vector; false if there are none.

    The vector is float32 [2K] for K scales: −running_min, then running_max. The elementwise maximum
    of several vectors that started from the same ranges is the vector for all their images.
    """

    def __init__(self, model: nn.Module) -> None:
        observers = (m for m in model.modules() if isinstance(m, MovingAverageMinMaxObserver))
        # Grouped by grid, in the same order in every process.
        self.observers = sorted((o for o in observers if o.observer_enabled), key=_grid)

    def __bool__(self) -> bool:
        return bool(self.observers)

    def _buffers(self, name: str) -> list[Tensor]:  # [n] each, views
        return [getattr(observer, name).view(-1) for observer in self.observers]

    def read(self) -> Tensor:
        """A copy of the ranges as a vector."""
        low, high = torch.cat(self._buffers("running_min")), torch.cat(self._buffers("running_max"))
        return torch.cat([-low, high])

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the ranges, and the scales and zero points that the ``observe`` op computes."""
        low, high = vector.chunk(2)
        low = -low
        scale, zero_point = (torch.cat(self._buffers(name)) for name in ("scale", "zero_point"))
        start = 0
        for grid, members in groupby(self.observers, key=_grid):
            part = slice(start, start + sum(o.scale.numel() for o in members))
            start = part.stop
            # For the op, the ranges are a first batch of two rows. A range that has not seen a
            # batch, +Inf and −Inf, is not finite and changes nothing.
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
