"""Pictures as bytes and as the floats that models take."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 ``x / 127.5 - 1`` in [-1, 1], the input of every model.

    Raises:
        TypeError: ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to the nearest uint8 images, with clipping: the inverse of ``to_float``."""
    return images.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
