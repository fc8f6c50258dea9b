"""Image sets that worker processes decode during iteration."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import active_children

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from divqat.data.sets import check_labels
from divqat.data.upload import to_device

STREAM_ABOVE = 4 * 2**30  # largest size in bytes of decoded images that are held in memory
PIECE = 32  # images that a worker decodes at a time, so that all workers share a large batch
AHEAD = 2  # minimum number of batches that are decoded ahead
CPU = torch.device("cpu")


def default_workers() -> int:
    """The number of cores minus one, at least 1; processes of torchrun share the cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


class Decoder:
    """Decodes files to images, in order. Its workers start at the first use and then stay idle
    between uses.

    Sets that share a decoder share the workers, which keep no state: they receive the names of the
    files to decode.

    Args:
        read: a picklable function from the path of a file to uint8 [C, H, W].
        shape: (C, H, W).
        workers: number of processes; None: :func:`default_workers`; 0: decode in this process.

    Raises:
        ValueError: ``workers`` is negative.
    """

    def __init__(
        self,
        read: Callable[[str], np.ndarray],
        shape: tuple[int, int, int],
        workers: int | None = None,
    ) -> None:
        if workers is not None and workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        self.read, self.shape = read, shape
        self.workers = default_workers() if workers is None else workers
        self._idle: DataLoader | None = None

    def __call__(
        self, paths: Sequence[str], lengths: Sequence[int], device: torch.device
    ) -> Iterator[Tensor]:
        """Decode ``paths`` in batches of ``lengths``, ahead of their use.

        Yields:
            uint8 [length, C, H, W] on ``device``.

        Raises:
            ValueError: a file cannot be decoded; the message names it.
            RuntimeError: a worker died; the message names its file.
        """
        pieces, start = list[Sequence[str]](), 0
        for length in lengths:
            end = start + length
            pieces += [paths[i : min(i + PIECE, end)] for i in range(start, end, PIECE)]
            start = end
        decoded = self._decode(pieces, max(lengths, default=0), device)
        for length in lengths:
            images = torch.empty(length, *self.shape, dtype=torch.uint8, device=device)
            done = 0
            while done < length:
                piece = next(decoded)
                images[done : done + len(piece)].copy_(piece, non_blocking=True)
                done += len(piece)
            yield images
        next(decoded, None)  # returns the workers

    def _decode(
        self, pieces: list[Sequence[str]], longest: int, device: torch.device
    ) -> Iterator[Tensor]:
        if not self.workers:
            files = _Files(self.read, 0)
            for item in enumerate(pieces):
                yield to_device(_checked(files[item]), device)
            return
        ahead = max(2, math.ceil(AHEAD * longest / (PIECE * self.workers)))
        loader = self._take(ahead, device.type == "cuda")
        loader.sampler.pieces = pieces  # type: ignore[attr-defined]
        try:
            yield from map(_checked, _start(loader, device))
        except (RuntimeError, OSError, EOFError) as error:  # the last two: it died while sending
            raise loader.dataset.death(error, pieces) from error  # type: ignore[attr-defined]
        # Not reached if the caller stops early or a file is damaged: these workers have unfinished
        # work, and end with the loader.
        self._idle = loader

    def _take(self, ahead: int, pin: bool) -> DataLoader:
        """The idle loader; a new one if there is none with this pinning and enough prefetching."""
        idle, self._idle = self._idle, None
        if idle is not None and idle.pin_memory == pin and (idle.prefetch_factor or 0) >= ahead:
            return idle
        return DataLoader(
            _Files(self.read, self.workers),
            batch_size=None,
            sampler=_Pieces(),
            num_workers=self.workers,
            prefetch_factor=ahead,
            persistent_workers=True,
            pin_memory=pin,
            # A DataLoader draws a seed for its workers: taken from the global generator, it would
            # change the dropout of a training.
            generator=torch.Generator(),
        )


def _start(loader: DataLoader, device: torch.device) -> Iterator[Tensor | str]:
    """``iter(loader)``, called in another thread.

    In the main thread it would set a handler of SIGCHLD. When a worker dies, this handler raises at
    an arbitrary point of the training, and does not know the file. Without it the error is raised
    at the next batch.
    """

    def start() -> Iterator[Tensor | str]:
        if device.type == "cuda":  # per thread; the loader pins its images for this device
            torch.cuda.set_device(device)
        return iter(loader)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(start).result()


class _Pieces(Sampler):
    """(number, paths) of each piece of the current pass."""

    pieces: Sequence[Sequence[str]] = ()

    def __iter__(self) -> Iterator[tuple[int, Sequence[str]]]:
        return enumerate(self.pieces)


class _Files(Dataset):
    """The data set inside the workers. For a damaged file it returns a message instead of raising,
    as an exception would carry the worker's traceback in its message."""

    def __init__(self, read: Callable[[str], np.ndarray], workers: int) -> None:
        self.read = read
        # Current process, piece and file of each worker, or 0; in shared memory, to survive it.
        self.progress = torch.zeros(workers, 3, dtype=torch.int64).share_memory_()

    def __getitem__(self, item: tuple[int, Sequence[str]]) -> Tensor | str:
        number, paths = item
        worker, images = get_worker_info(), []
        at = torch.zeros(3) if worker is None else self.progress[worker.id]
        for index, path in enumerate(paths):
            at.copy_(torch.tensor([os.getpid(), number, index]))
            try:
                images.append(self.read(path))
            except Exception as error:  # a damaged file may raise anything
                return (
                    f"{path} cannot be decoded ({error!r}); a streamed set cannot leave it out: "
                    "delete or replace it"
                )
            finally:
                at.zero_()
        return torch.from_numpy(np.stack(images))

    def death(self, error: Exception, pieces: Sequence[Sequence[str]]) -> RuntimeError:
        """The error for a dead worker, which names its current file."""
        files: list[str] = []
        for _ in range(10):  # its pipes close a moment before it counts as dead
            alive = {child.pid for child in active_children()}
            current = [(pid, pieces[piece][i]) for pid, piece, i in self.progress.tolist() if pid]
            files = [path for pid, path in current if pid not in alive]
            if files:
                break
            time.sleep(0.1)
        at = f" at {', '.join(files)}" if files else ""
        return RuntimeError(f"a process that decodes images died{at}: {error!r}")


def _checked(piece: Tensor | str) -> Tensor:
    if isinstance(piece, str):
        raise ValueError(piece)
    return piece


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """Labeled images that stay in their files until a batch needs them.

    Its batches are those of an :class:`ImageSet` of the same images, bit for bit.

    Args:
        paths: N files.
        labels: int64 [N], not negative.
        decoder: reads the files.
        device: of the batches; the same as that of ``labels``.

    Raises:
        TypeError: wrong dtype.
        ValueError: different lengths or a negative label.
    """

    paths: Sequence[str]
    labels: Tensor  # int64 [N]
    decoder: Decoder
    device: torch.device = CPU

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.decoder.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        return len(self) * math.prod(self.image_shape)

    @property
    def images(self) -> Tensor:
        """All images, decoded now: uint8 [N, C, H, W] on ``device``. Use it for a small subset.

        Raises:
            ValueError: they exceed ``STREAM_ABOVE`` bytes, or see :class:`Decoder`.
        """
        if self.nbytes > STREAM_ABOVE:
            raise ValueError(
                f"{len(self)} streamed images are {self.nbytes / 2**30:.1f} GiB: "
                "take a subset(), or iterate over them with divqat.data.batches"
            )
        ((images, _),) = self.gather(torch.arange(len(self)), [len(self)])
        return images

    def subset(self, indices: Tensor | slice) -> StreamedSet:
        """The images at ``indices``: int64 [M], bool [N] or a slice."""
        rows = torch.arange(len(self), device=self.labels.device)[indices].tolist()
        return replace(self, paths=[self.paths[i] for i in rows], labels=self.labels[indices])

    def to(self, device: torch.device) -> StreamedSet:
        """The same set with its batches on ``device``."""
        return replace(self, labels=self.labels.to(device), device=device)

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`ImageSet.gather`."""
        paths = [self.paths[i] for i in rows.tolist()]
        labels = self.labels[to_device(rows, self.device)].split(list(lengths))
        # The decoder comes first in zip, which exhausts it: it then returns its workers.
        yield from zip(self.decoder(paths, lengths, self.device), labels, strict=True)
