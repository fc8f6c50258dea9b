"""Training in several processes, and a step's batch in several parts.

``torchrun --nproc-per-node=N -m divqat train …`` does the steps that one process would do: the
batch of a step is the same, process r of N gathers and augments every N-th image of it, from
number r on (``shard`` of :func:`divqat.data.batches`).

What is sent, for ResNet-50 (25.6 million parameters, 54 activation ranges):

========  =========================================  ==========================
each      what                                       bytes per process
========  =========================================  ==========================
step      gradients, by DistributedDataParallel, in  102 MB (float32), behind
          buckets of 25 MB                           the backward pass
step      ranges of all observers, one all-reduce    54 · 2 · 4 = 432
step      with ``sync_batchnorm``, each BatchNorm's  53 all-reduces, in all 8 ·
          [Σ x, Σ x², n], float64, in the forward    (53,120 + 53) = 0.43 MB
          and Σ of γ's and β's gradients, float32,   53 all-reduces, in all 4 ·
          in the backward                            53,120 = 0.21 MB
50 steps  are images, logits and loss finite         50 · 3 = 150
epoch     sums for the log; BatchNorm's statistics   40; 53,120 · 8 = 0.4 MB
start     checkpoint of process 0; weights, by DDP   205 MB; 102 MB
========  =========================================  ==========================

The 432 bytes cost one latency. A collective per layer would cost 54, in a row, within the forward
pass, and nothing could hide them.

BatchNorm normalizes by the statistics of a process's own part, as is usual; at the end of an epoch
the running ones are averaged, so that all processes, the checkpoint and a frozen BatchNorm hold
the same. Keep 16 images or more per process and part, or freeze it, or say ``sync_batchnorm``
(:mod:`divqat.train.batchnorm`): the statistics are then those of all processes' images, and N
processes train what one does while BatchNorm moves, too. Of a part: with ``accumulate`` the parts
run one after another, each with statistics of its own. That is the collective per layer, 53 in a
row in the forward and 53 in the backward; a BatchNorm that is frozen sends nothing.

At 1,000 GPUs this breaks, by calculation, not measured, in this order:

1. Every process holds the data set (unless it is streamed), and validates on all of it, while the
   epoch gets N times shorter. Remedy: shards of both.
2. One failure ends the job, and an epoch is lost. Remedy: checkpoints within an epoch.
3. The gradients' ring sends 2 · 102 MB per GPU whatever N is (4 ms at 50 GB/s), and its latency
   grows with N. Remedy: DDP's bfloat16 hook, a tree. The ranges stay at one latency, about 10
   hops of a tree.
4. Every process draws the order and the shifts of the whole batch, 32,000 numbers per step, under
   a millisecond, so that the images are those of one process.

With ``sync_batchnorm`` another comes before the third: 106 latencies in a row in every step, each
of 10 hops: 5 ms at 5 µs a hop, whatever the images per GPU, where the 0.64 MB themselves are
nothing. Remedy: groups of 8 GPUs, those of a machine, that share statistics; or to freeze early.

And a batch that large wants another optimizer than SGD before any of this.
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
from divqat.train.batchnorm import whole_batch

T = TypeVar("T")
CPU = torch.device("cpu")
# The longest that a process works alone is process 0 on a checkpoint. One that waits longer than
# this has lost the others.
TIMEOUT = timedelta(minutes=10)


def launched() -> tuple[int, int]:
    """This process's number and how many there are: as torchrun says, (0, 1) without it."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def local_device(name: str) -> str:
    """The device for this process where ``name``, ``auto`` or ``cuda``, leaves it open."""
    if launched()[1] > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


@contextmanager
def connect(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, those of the process group that is there, or this one.

    After an error the group is left as it is: to take it down could mean to wait for the others,
    and the sooner this process ends, the sooner torchrun ends them.
    """
    rank, size = launched()
    if dist.is_available() and dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size(), device)
    elif size == 1:
        yield Team(device=device)
    else:
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
        yield Team(rank, size, device)
        dist.destroy_process_group()


@dataclass(frozen=True)
class Part:
    """What one process runs forward and backward at a time.

    Attributes:
        images, index: [n, C, H, W], and [n]: their numbers in the training set.
        count: how many images of the batch they are: n, or less where images are repeated.
        weight: what the mean loss of the part is multiplied by, so that the gradients add up (over
            parts) and average (over processes, by DDP) to that of the mean over the batch.
    """

    images: Tensor
    index: Tensor
    count: int
    weight: float


@dataclass(frozen=True)
class Team:
    """Process ``rank`` of ``size``; everything here sends nothing where there is only one."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model``, made to average gradients in its backward pass."""
        if self.size == 1:
            return model
        net = DistributedDataParallel(model)
        # Buffers are ours to synchronise: ranges once per step, BatchNorm once per epoch. Set here
        # as torch 2.13 has renamed the argument.
        net.broadcast_buffers = False
        return net

    def parts(
        self,
        model: nn.Module,  # of wrap
        images: Tensor,  # [n, C, H, W], this process's own of the batch
        index: Tensor,  # [n]
        total: int,  # images of the whole batch
        count: int,
    ) -> Iterator[Part]:
        """This process's images in ``count`` parts, to run forward and backward one after another.

        In between, and at the end over all processes, activation ranges are merged to what they
        were had the batch been one. Gradients are sent with the last part only.

        A part that gets no image repeats the process's first one and counts 0: DDP wants a
        backward from everyone, and a range does not change by an image that it has seen. So does a
        process that has none of the batch; what it was given instead is the batch's first image.
        BatchNorm cannot train on a single image: it is repeated, too, which leaves the mean over
        the part as it is. In the statistics of all processes repeated images do not count.
        """
        if self.size == count == 1:
            yield Part(images, index, total, 1.0)
            return
        ranges = Ranges(model)
        before = merged = ranges.read() if ranges else torch.empty(0)
        own = len(range(self.rank, total, self.size))
        for number in range(count):
            mine = range(own)[number::count]
            rows = slice(number, None, count) if len(mine) > 1 else [*mine, *mine, 0, 0][:2]
            # Where no process has an image for this part, the repeated ones make its statistics.
            fillers = max(0, 2 - len(mine)) if number * self.size < total else 0
            silent = isinstance(model, DistributedDataParallel) and number < count - 1
            if number and ranges:
                ranges.write(before)
            unsent = model.no_sync() if silent else nullcontext()  # type: ignore[operator]
            with unsent, whole_batch(model, fillers):
                yield Part(images[rows], index[rows], len(mine), self.size * len(mine) / total)
            if ranges:
                merged = ranges.read() if number == 0 else torch.maximum(merged, ranges.read())
        if ranges:
            ranges.write(self.reduce(merged, "MAX"))

    def reduce(self, value: Tensor, op: str = "SUM") -> Tensor:
        """``value`` over all processes, in place; ``op``: SUM, MAX or MIN."""
        if self.size > 1:
            dist.all_reduce(value, getattr(dist.ReduceOp, op))
        return value

    def broadcast(self, value: T) -> T:
        """What process 0 has: plain data and tensors. Others may not see the files that it sees."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @torch.no_grad()
    def average_batchnorm(self, model: nn.Module) -> None:
        """Running means and variances become the mean over the processes; equal ones stay."""
        if self.size == 1:
            return
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        if buffers:
            # float64: the mean of N equal float32 is that float32.
            flat = torch.cat([buffer.view(-1).double() for buffer in buffers])
            means = self.reduce(flat) / self.size
            for buffer, mean in zip(
                buffers, means.split([b.numel() for b in buffers]), strict=True
            ):
                buffer.copy_(mean)
