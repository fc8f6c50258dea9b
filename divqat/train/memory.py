"""How much memory a training takes, and how large a batch would fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")


def reset_peak(device: torch.device) -> None:
    """Measure the peak from now on; where the system cannot (not Linux), it stays unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.is_file():
        with suppress(OSError):  # then it is the peak of the process, an upper bound
            CLEAR.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use since :func:`reset_peak`: of tensors on a GPU, of the whole process on
    the CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(STATUS, "VmHWM")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    swap = _kilobytes(Path("/proc/meminfo"), "SwapFree")
    if available is None:
        return None
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return available + (swap or 0)
    # Files that were read a while ago are given up where memory is short.
    cached = _number(CGROUP / "memory.stat", "inactive_file") or 0
    return min(available + (swap or 0), limit - used + cached)


@dataclass(frozen=True)
class Need:
    """What a step needs at least.

    Attributes:
        images: that run forward and backward at a time.
        each: bytes that one of them keeps for the backward pass.
    """

    images: int
    each: int
    device: torch.device

    @classmethod
    def of(
        cls, forward: Callable[[nn.Module], Tensor], model: nn.Module, sample: int, images: int
    ) -> Need:
        """Measured on a copy of ``model`` with ``forward(copy)``, of ``sample`` images."""
        trial = copy.deepcopy(model).train()
        device = next(model.parameters()).device
        kept = saved_bytes(lambda: forward(trial), trial.parameters())
        return cls(images, kept // sample, device)

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
    def told(self) -> Iterator[None]:
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


def _kilobytes(file: Path, name: str) -> int | None:
    """The value of ``name`` in a file of lines ``name: 123 kB``, in bytes."""
    value = _number(file, f"{name}:")
    return None if value is None else 1024 * value


def _number(file: Path, name: str) -> int | None:
    """The number after ``name`` at the begin of a line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return None
