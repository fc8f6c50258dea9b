"""From uint8 images to batches of floats; whole batches at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from divqat.data.sets import ImageSet


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 ``x / 127.5 - 1`` in [-1, 1], the input of every model.

    Raises:
        TypeError: ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.float().div_(127.5).sub_(1)


def augment(
    images: Tensor,  # uint8 or float [N, C, H, W]
    generator: Generator,
    *,
    pad: int,
    flip: bool = False,
) -> Tensor:  # like images
    """Shift every image by up to ``pad`` pixels and mirror it with probability 1/2.

    Pixels from outside are black: 0 for uint8 images, -1 for float images (see :func:`to_float`).

    Args:
        images: [N, C, H, W] on any device, uint8 or float in [-1, 1].
        generator: a CPU generator; it alone determines the result.
        pad: largest shift in each direction.
        flip: mirror left-right as well.

    Raises:
        ValueError: ``images`` is not 4-dimensional or ``pad`` is negative.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}")
    if pad < 0:
        raise ValueError(f"pad must not be negative, got {pad}")
    n, channels, height, width = images.shape
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    rows = top + torch.arange(height)  # [N, H], in the padded image
    columns = left + torch.arange(width)  # [N, W]
    if flip:
        mirror = torch.randint(2, (n, 1), generator=generator).bool()
        columns = torch.where(mirror, columns.flip(1), columns)
    padded = F.pad(images, (pad,) * 4, value=-1 if images.is_floating_point() else 0)
    device = images.device
    return padded[
        torch.arange(n, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows.to(device)[:, None, :, None],
        columns.to(device)[:, None, None, :],
    ]


def batches(
    data: ImageSet,
    batch_size: int,
    *,
    generator: Generator | None = None,
    augment: Callable[[Tensor, Generator], Tensor] | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate once over ``data``.

    Args:
        data: the images.
        batch_size: at least 1.
        generator: a CPU generator that shuffles and augments; None: in order.
        augment: called as ``augment(images_uint8, generator)``, for example
            ``functools.partial(divqat.data.augment, pad=2, flip=True)``; needs ``generator``.
        drop_last: leave out a last batch that is not full.

    Yields:
        images float32 [batch, C, H, W] in [-1, 1] and labels int64 [batch].

    Raises:
        ValueError: ``batch_size`` below 1, or ``augment`` without ``generator``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if augment is not None and generator is None:
        raise ValueError("augment needs a generator, got None")
    return _batches(data, batch_size, generator, augment, drop_last)


# The checks above must not wait for the first batch, so the generator function is this one.
def _batches(
    data: ImageSet,
    batch_size: int,
    generator: Generator | None,
    augment: Callable[[Tensor, Generator], Tensor] | None,
    drop_last: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    order = None if generator is None else torch.randperm(len(data), generator=generator)
    if order is not None:
        order = order.to(data.images.device)
    end = len(data) - len(data) % batch_size if drop_last else len(data)
    for start in range(0, end, batch_size):
        chunk = slice(start, min(start + batch_size, end))
        batch = data.subset(chunk if order is None else order[chunk])
        images = batch.images
        if augment is not None and generator is not None:
            images = augment(images, generator)
        yield to_float(images), batch.labels
