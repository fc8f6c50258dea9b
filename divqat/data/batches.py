"""From uint8 images to batches of floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from divqat._util.pictures import to_float as to_float
from divqat._util.pictures import to_uint8 as to_uint8
from divqat.data.sets import LabeledImages
from divqat.data.upload import to_device


def augment(
    images: Tensor,  # uint8 or float [N, C, H, W]
    generator: Generator,
    *,
    pad: int,
    flip: bool = False,
    rows: slice = slice(None),
    total: int | None = None,
) -> Tensor:  # like images
    """Shift every image by up to ``pad`` pixels and mirror it with probability 1/2.

    Pixels from outside the image are black: 0 in uint8, -1 in float (see :func:`to_float`).

    Args:
        images: [N, C, H, W] on any device, uint8 or float in [-1, 1].
        generator: a CPU generator; it alone determines the result.
        pad: largest shift in each direction.
        flip: also mirror left-right.
        rows, total: ``images`` are these rows of a batch of ``total`` images. Random numbers are
            drawn for the whole batch: the result is ``augment(batch, generator, …)[rows]``.

    Raises:
        ValueError: ``images`` is not 4-dimensional, ``pad`` is negative, or the number of images
            is not that of ``rows`` of ``total``.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}")
    if pad < 0:
        raise ValueError(f"pad must not be negative, got {pad}")
    n, channels, height, width = images.shape
    total, device = n if total is None else total, images.device
    if len(range(total)[rows]) != n:
        raise ValueError(
            f"wanted {len(range(total)[rows])} images, as for {rows} of {total}, got {n}"
        )
    draws = torch.randint(2 * pad + 1, (2, total, 1), generator=generator)
    if flip:
        draws = torch.cat([draws, torch.randint(2, (1, total, 1), generator=generator)])
    top, left, *mirror = to_device(draws[:, rows], device)
    y = top + torch.arange(height, device=device)  # [N, H], in the padded image
    x = left + torch.arange(width, device=device)  # [N, W]
    if flip:
        x = torch.where(mirror[0].bool(), x.flip(1), x)
    padded = F.pad(images, (pad,) * 4, value=-1 if images.is_floating_point() else 0)
    return padded[
        torch.arange(n, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        y[:, None, :, None],
        x[:, None, None, :],
    ]


def batches(
    data: LabeledImages,
    batch_size: int,
    *,
    generator: Generator | None = None,
    augment: Callable[..., Tensor] | None = None,
    drop_last: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate once over ``data``, without a host sync if it is on a GPU.

    Args:
        data: the images.
        batch_size: at least 1.
        generator: a CPU generator that shuffles and augments; None: in order.
        augment: called as ``augment(images_uint8, generator)``, for example
            ``functools.partial(divqat.data.augment, pad=2, flip=True)``; needs ``generator``. With
            several shards it also gets ``rows`` and ``total``, see :func:`augment`.
        drop_last: drop an incomplete last batch.
        shard: (rank, size): yield the rows rank, rank + size, rank + 2 size ... of each batch, see
            :func:`shard_rows`; all shards together have the batches of ``(0, 1)``.

    Yields:
        images float32 [batch, C, H, W] in [-1, 1] and labels int64 [batch], on the set's device.

    Raises:
        ValueError: ``batch_size`` below 1, ``augment`` without ``generator``, or no such shard.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if augment is not None and generator is None:
        raise ValueError("augment needs a generator, got None")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (rank, size) with 0 <= rank < size, got {shard}")
    return _batches(data, batch_size, generator, augment, drop_last, shard)


def steps_per_epoch(size: int, batch_size: int) -> tuple[int, bool]:
    """The number of batches of an epoch of ``size`` images, and whether the last one is dropped.

    A last batch of a single image is dropped, as batch norm cannot train on it.
    """
    drop_last = size > batch_size and size % batch_size == 1
    return (size // batch_size if drop_last else -(-size // batch_size)), drop_last


def shard_rows(total: int, shard: tuple[int, int]) -> slice:
    """The rows of a batch of ``total`` images for ``shard`` (rank, size).

    If a batch has fewer images than there are shards, the remaining shards get its first image, so
    that they have something to run; they must give it no weight.
    """
    rank, size = shard
    return slice(rank, total, size) if rank < total else slice(0, 1)


# A separate generator function, so that the checks above run before the first batch.
def _batches(
    data: LabeledImages,
    batch_size: int,
    generator: Generator | None,
    augment: Callable[..., Tensor] | None,
    drop_last: bool,
    shard: tuple[int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    n = len(data)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    end = n - n % batch_size if drop_last else n
    totals = [min(batch_size, end - start) for start in range(0, end, batch_size)]
    slices = [shard_rows(total, shard) for total in totals]
    parts = [batch[rows] for batch, rows in zip(order[:end].split(totals), slices, strict=True)]
    # `gathered` comes first in zip, which exhausts it: a streamed set then cleans up.
    gathered = data.gather(torch.cat([order[:0], *parts]), [len(rows) for rows in parts])
    for (images, labels), total, rows in zip(gathered, totals, slices, strict=True):
        if augment is not None and shard[1] > 1:
            images = augment(images, generator, rows=rows, total=total)
        elif augment is not None:
            images = augment(images, generator)
        yield to_float(images), labels
