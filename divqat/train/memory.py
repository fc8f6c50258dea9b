"""How much memory a training step needs, and how large a batch fits."""

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
    """A lower bound of the memory that a training step needs.

    Attributes:
        images: size of a micro-batch, proxies included.
        bytes_per_image: what autograd saves for the backward pass.
        device: where the step runs.
    """

    images: int
    bytes_per_image: int
    device: torch.device

    @classmethod
    def measure(cls, step: Step, train_set: LabeledImages, images_of_step: int) -> StepMemory:
        """Measure two training images in a copy of the step's model.

        Args:
            images_of_step: images of the whole step, proxies included.
        """
        images, _ = next(batches(train_set.subset(slice(2)), 2))
        batch = images.contiguous(memory_format=torch.channels_last)
        trial = copy.deepcopy(step.model).train()
        saved = saved_bytes(lambda: step.forward(trial, batch), trial.parameters())
        # Codes take a quarter of float32, and everything else at least that.
        compression = 4 if step.running.save_as_codes else 1
        micro_batches = step.world.size * step.accumulate
        bytes_per_image = saved // (compression * len(images))
        return cls(-(-images_of_step // micro_batches), bytes_per_image, step.world.device)

    def check(self) -> None:
        """Refuse a batch that cannot fit, before the system kills the process.

        Raises:
            MemoryError: the saved activations alone exceed the free memory.
        """
        free = free_memory(self.device)
        if free is not None and self.images * self.bytes_per_image > free:
            raise self.error(free)

    def error(self, free: int | None) -> MemoryError:
        """An error that says how many images would fit in ``free`` bytes, if that is known."""
        room = "memory is full"
        if free is not None:
            fits = free // max(1, self.bytes_per_image)
            room = f"{free / 2**20:,.0f} MB are free, enough for at most {fits:,}"
        needed = self.images * self.bytes_per_image
        return MemoryError(
            f"batch_size: {self.images:,} images at a time do not fit: they need at least "
            f"{needed / 2**20:,.0f} MB for the backward pass, {room}; use fewer, raise accumulate, "
            "or train in bfloat16"
        )

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Within this block, running out of memory raises :meth:`error`."""
        try:
            yield
        except RuntimeError as error:
            # The CPU allocator raises a plain RuntimeError.
            if not (
                isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            ):
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise self.error(free_memory(self.device)) from error


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the tensors that autograd saves in ``forward`` for the backward pass, without
    ``parameters``."""
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # By address, so that each counts once. Holding them keeps their addresses from being reused.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in excluded)
