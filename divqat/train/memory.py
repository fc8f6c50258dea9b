"""How much memory a training takes, and how large a batch would fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from divqat._util.memory import free_memory
from divqat.data import LabeledImages
from divqat.data.batches import batches
from divqat.train.step import Step


@dataclass(frozen=True)
class StepMemory:
    """What a step needs at least.

    Attributes:
        images: that run forward and backward at a time.
        each: bytes that one of them keeps for the backward pass.
    """

    images: int
    each: int
    device: torch.device

    @classmethod
    def of(cls, step: Step, train_set: LabeledImages, images_of_step: int) -> StepMemory:
        """From two training images in a copy of the step's model; ``images_of_step`` of the whole
        step, proxies included."""
        images, _ = next(batches(train_set.subset(slice(2)), 2))
        batch = images.contiguous(memory_format=torch.channels_last)
        trial = copy.deepcopy(step.model).train()
        kept = saved_bytes(lambda: step.forward(trial, batch), trial.parameters())
        # Codes are a quarter of float32; what else is kept is at least as much.
        share = 4 if step.running.save_as_codes else 1
        parts = step.team.size * step.accumulate
        return cls(-(-images_of_step // parts), kept // (share * len(images)), step.team.device)

    def check(self) -> None:
        """Refuse what cannot fit, before the system kills the process for trying.

        Raises:
            MemoryError: the activations alone are more than is free.
        """
        free = free_memory(self.device)
        if free is not None and self.images * self.each > free:
            raise self.error(free)

    def error(self, free: int | None) -> MemoryError:
        """That it does not fit, and what would."""
        room = "memory is full"
        if free is not None:
            room = (
                f"{free / 2**20:,.0f} MB are free, enough for at most {free // max(1, self.each):,}"
            )
        return MemoryError(
            f"batch_size: {self.images:,} images at a time do not fit: they keep at least "
            f"{self.images * self.each / 2**20:,.0f} MB for the backward pass, {room}; take fewer, "
            "accumulate more parts, or train in bfloat16"
        )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A block in which running out of memory becomes :meth:`error`."""
        try:
            yield
        except RuntimeError as error:
            # The CPU's allocator has no class of its own.
            if not (
                isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            ):
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise self.error(free_memory(self.device)) from error


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the tensors that ``forward`` keeps for the backward pass, ``parameters`` aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}  # each once; held, or another one could get its address

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
