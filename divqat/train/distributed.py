"""Data-parallel training, and gradient accumulation over micro-batches.

``torchrun --nproc-per-node=N -m divqat train …`` takes the same steps as one process: the global
batch of a step is the same, and rank r of N loads and augments every N-th image of it, starting
with image r (``shard`` of :func:`divqat.data.batches`).

Communication for ResNet-50 (25.6 million parameters, 54 activation ranges):

========  =========================================  ==========================
per       what                                       bytes per process
========  =========================================  ==========================
step      gradients, by DistributedDataParallel, in  102 MB (float32), over-
          buckets of 25 MB                           lapped with the backward
step      ranges of all observers, one all-reduce    54 · 2 · 4 = 432
step      with ``sync_batchnorm``, each BatchNorm's  53 all-reduces, in all 8 ·
          [Σ x, Σ x², n], float64, in the forward    (53,120 + 53) = 0.43 MB
          and Σ of γ's and β's gradients, float32,   53 all-reduces, in all 4 ·
          in the backward                            53,120 = 0.21 MB
50 steps  whether images, logits, loss are finite    50 · 3 · 8 = 1,200
epoch     sums for the log; BatchNorm statistics     40; 53,120 · 8 = 0.4 MB
start     checkpoint of rank 0; weights, by DDP      205 MB; 102 MB
========  =========================================  ==========================

The 432 bytes cost one latency. One collective per layer would cost 54 in a row within the forward
pass, with nothing to overlap them with.

As usual, BatchNorm normalizes by the statistics of the process's own micro-batch. At the end of an
epoch the running statistics are averaged, so that they are the same in all processes, in the
checkpoint and in a frozen BatchNorm. Keep at least 16 images per process and micro-batch, or freeze
BatchNorm, or set ``sync_batchnorm`` (:mod:`divqat.train.batchnorm`): then the statistics cover all
processes' images, and N processes train the same model as one even before BatchNorm freezes. With
``accumulate`` the micro-batches run one after another, and each still has its own statistics.
``sync_batchnorm`` costs 53 collectives in a row in the forward and 53 in the backward pass; a
frozen BatchNorm sends nothing.

Limits at 1,000 GPUs (calculated, not measured), the first one first:

1. Every process holds the data set (unless it is streamed) and validates on all of it, while an
   epoch gets N times shorter. Remedy: shard both.
2. One failure ends the job and loses an epoch. Remedy: checkpoints within an epoch.
3. The ring all-reduce of the gradients sends 2 · 102 MB per GPU for every N (4 ms at 50 GB/s), and
   its latency grows with N. Remedy: DDP's bfloat16 hook, a tree all-reduce. The ranges still cost
   one latency, about 10 hops of a tree.
4. Every process draws the order and shifts of the whole global batch, so that the images are the
   same as with one process: 32,000 numbers per step, under a millisecond.

``sync_batchnorm`` adds a limit before the third: 106 latencies in a row per step, each of 10 hops,
which is 5 ms at 5 µs a hop for any number of images per GPU; the 0.64 MB themselves are negligible.
Remedy: share statistics among the 8 GPUs of a machine only, or freeze early.

Before any of this, a batch of that size needs an optimizer other than SGD.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from divqat.quantize.ranges import Ranges
from divqat.train.batchnorm import synchronized_batchnorm

T = TypeVar("T")
CPU = torch.device("cpu")
# The others wait longest while rank 0 writes a checkpoint. A process that waits longer than this
# has lost the others.
TIMEOUT = timedelta(minutes=10)


def rank_and_world_size() -> tuple[int, int]:
    """Rank and world size as set by torchrun; (0, 1) without it."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def local_device(name: str) -> str:
    """The device of this process: under torchrun its own GPU if ``name`` is ``auto`` or ``cuda``,
    else ``name``."""
    if rank_and_world_size()[1] > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


@contextmanager
def connect(device: torch.device) -> Iterator[World]:
    """Join the existing process group, or the one that torchrun describes; without both, the world
    is this process alone.

    After an error the group is not destroyed: that could block until the others respond, and the
    sooner this process exits, the sooner torchrun ends the others.
    """
    rank, size = rank_and_world_size()
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), device)
    elif size == 1:
        yield World(device=device)
    else:
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
        yield World(rank, size, device)
        dist.destroy_process_group()


@dataclass(frozen=True)
class MicroBatch:
    """The images that a process runs forward and backward at a time.

    Attributes:
        images: float32 [n, C, H, W]; a :class:`divqat.train.step.Step` appends proxies.
        index: int64 [n], their positions in the training set.
        count: number of distinct images of the batch: n, or less where images are repeated.
        weight: factor for the mean loss of the micro-batch. With it the gradients, summed over
            micro-batches and averaged over processes by DDP, are those of the global batch's mean.
    """

    images: Tensor
    index: Tensor
    count: int
    weight: float


@dataclass(frozen=True)
class World:
    """This process is ``rank`` of ``size``. With a single process nothing is communicated."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` in DistributedDataParallel, which averages gradients in the backward pass."""
        if self.size == 1:
            return model
        net = DistributedDataParallel(model)
        # Buffers are synchronized here instead: ranges once per step, BatchNorm once per epoch. Set
        # as an attribute because torch 2.13 renamed the argument.
        net.broadcast_buffers = False
        return net

    def micro_batches(
        self,
        model: nn.Module,  # from wrap
        images: Tensor,  # float32 [n, C, H, W], this process's shard of the batch
        index: Tensor,  # int64 [n]
        total: int,  # images of the global batch
        count: int,
    ) -> Iterator[MicroBatch]:
        """Split this process's shard into ``count`` micro-batches, each to be run forward and
        backward before the next one.

        Activation ranges are merged over the micro-batches and at the end over all processes; they
        become what the undivided batch would have given. Gradients are sent with the last
        micro-batch only.

        A micro-batch without images repeats the first image of the shard, with a count of 0: DDP
        needs a backward pass from every process, and seeing an image again does not change a range.
        A process without images of the batch does the same; its shard is the first image of the
        batch instead. BatchNorm cannot train on a single image, so that is repeated as well, which
        does not change the mean loss. Synchronized statistics leave out the repeated images.
        """
        if self.size == count == 1:
            yield MicroBatch(images, index, total, 1.0)
            return
        ranges = Ranges(model)
        before = merged = ranges.read() if ranges else torch.empty(0)
        shard = range(len(range(self.rank, total, self.size)))
        for number in range(count):
            mine = shard[number::count]
            rows = slice(number, None, count) if len(mine) > 1 else [*mine, *mine, 0, 0][:2]
            # If no process has an image for this micro-batch, the repeated ones count after all.
            padding = max(0, 2 - len(mine)) if number * self.size < total else 0
            no_sync = isinstance(model, DistributedDataParallel) and number < count - 1
            if number and ranges:
                ranges.write(before)
            sync = model.no_sync() if no_sync else nullcontext()  # type: ignore[operator]
            with sync, synchronized_batchnorm(model, padding):
                yield MicroBatch(
                    images[rows], index[rows], len(mine), self.size * len(mine) / total
                )
            if ranges:
                merged = ranges.read() if number == 0 else torch.maximum(merged, ranges.read())
        if ranges:
            ranges.write(self.reduce(merged, "MAX"))

    def reduce(self, value: Tensor, op: str = "SUM") -> Tensor:
        """All-reduce ``value`` in place; ``op`` is SUM, MAX or MIN."""
        if self.size > 1:
            dist.all_reduce(value, getattr(dist.ReduceOp, op))
        return value

    def broadcast(self, value: T) -> T:
        """The ``value`` of rank 0: plain data and tensors. Other ranks may not see its files."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @torch.no_grad()
    def average_batchnorm(self, model: nn.Module) -> None:
        """Replace running means and variances by their means over all processes. Values that are
        equal everywhere keep their bits."""
        if self.size == 1:
            return
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        if buffers:
            # In float64 the mean of N equal float32 numbers is that number.
            flat = torch.cat([buffer.view(-1).double() for buffer in buffers])
            means = self.reduce(flat) / self.size
            for buffer, mean in zip(
                buffers, means.split([b.numel() for b in buffers]), strict=True
            ):
                buffer.copy_(mean)
