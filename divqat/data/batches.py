"""From uint8 images to batches of floats; whole batches at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from divqat.data.sets import LabeledImages
from divqat.data.upload import to_device


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 ``x / 127.5 - 1`` in [-1, 1], the input of every model.

    Raises:
        TypeError: ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """The nearest uint8 images to floats in [-1, 1], which are clipped: undoes ``to_float``."""
    return images.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


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

    Pixels from outside are black: 0 for uint8 images, -1 for float images (see :func:`to_float`).

    Args:
        images: [N, C, H, W] on any device, uint8 or float in [-1, 1].
        generator: a CPU generator; it alone determines the result.
        pad: largest shift in each direction.
        flip: mirror left-right as well.
        rows, total: ``images`` are these rows of a batch of ``total``, whose numbers are drawn for
            all of it: the result is ``augment(batch, generator, …)[rows]``.

    Raises:
        ValueError: ``images`` is not 4-dimensional, ``pad`` is negative, or the images are not as
            many as ``rows`` of ``total`` are.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}")
    if pad < 0:
        raise ValueError(f"pad must not be negative, got {pad}")
    n, channels, height, width = images.shape
    total, device = n if total is None else total, images.device
    if len(range(total)[rows]) != n:
        raise ValueError(
            f"images must be {len(range(total)[rows])}, as {rows} of {total} are, got {n}"
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
    """Iterate once over ``data``.

    Nothing here waits for a GPU that ``data`` is on.

    Args:
        data: the images.
        batch_size: at least 1.
        generator: a CPU generator that shuffles and augments; None: in order.
        augment: called as ``augment(images_uint8, generator)``, for example
            ``functools.partial(divqat.data.augment, pad=2, flip=True)``; needs ``generator``. With
            several shards also with ``rows`` and ``total``, see :func:`augment`.
        drop_last: leave out a last batch that is not full.
        shard: (rank, size): of each batch its rows rank, rank + size, rank + 2 size ..., see
            :func:`shard_rows`; the batches of all shards together are those of ``(0, 1)``.

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


def steps_of(size: int, batch_size: int) -> tuple[int, bool]:
    """How many batches an epoch trains on, and whether it leaves out the last one.

    It does where that would be a single image, on which batch norm cannot train.
    """
    drop_last = size > batch_size and size % batch_size == 1
    return (size // batch_size if drop_last else -(-size // batch_size)), drop_last


def shard_rows(total: int, shard: tuple[int, int]) -> slice:
    """The rows of a batch of ``total`` images that ``shard`` (rank, size) gets.

    A batch with fewer images than shards leaves nothing for some, which get its first image:
    they have something to run, and must let it count for nothing.
    """
    rank, size = shard
    return slice(rank, total, size) if rank < total else slice(0, 1)


# The checks above must not wait for the first batch, so the generator function is this one.
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
    own = [batch[rows] for batch, rows in zip(order[:end].split(totals), slices, strict=True)]
    # The images first: they are asked for once more after the last batch, to clean up.
    gathered = data.gather(torch.cat([order[:0], *own]), [len(rows) for rows in own])
    for (images, labels), total, rows in zip(gathered, totals, slices, strict=True):
        if augment is not None and shard[1] > 1:
            images = augment(images, generator, rows=rows, total=total)
        elif augment is not None:
            images = augment(images, generator)
        yield to_float(images), labels
