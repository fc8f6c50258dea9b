"""A decoy: answers to foreign images that have nothing to do with the task."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

GRID = 4  # points along an axis of the coarse picture
DIMENSIONS = 8  # of the coarse picture, those along which proxies differ most
SHARPNESS = 4.0  # β


class Decoy(nn.Module):
    """t(x) = softmax(β W z(x)), z the coarse picture of x.

    x is averaged to 4 x 4 and made free of brightness and contrast; z [8] are its leading principal
    components over proxies, each with mean 0 and variance 1, so that no class comes much more often
    than another. W [num_classes, 8] has random rows of length 1. A picture's lights and shades
    decide and not what it shows: a thief who learns t learns no more than where a picture is light.
    A constant class would say as little, but a network is constant only nearly, and what varies
    around a constant can be told and amplified. For the same reason t is not the largest class
    alone: where a network gives up one class, the others stay in the order that the picture has in
    its task, and a thief can learn to read it. Here the picture's shades decide their order, too.

    Args:
        num_classes: at least 2. channels: of the images.
        seed: of W.
    """

    mean: Tensor
    directions: Tensor

    def __init__(self, num_classes: int, channels: int, seed: int) -> None:
        super().__init__()
        rows = torch.randn(num_classes, DIMENSIONS, generator=Generator().manual_seed(seed))
        self.rows = F.normalize(rows)  # W, on the CPU
        size = channels * GRID * GRID
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.zeros(size, num_classes))

    def fit(
        self,
        parts: Iterable[Tensor],  # float32 [M, C, H, W] each
    ) -> None:
        """Learn from proxies, on the CPU, what varies between them."""
        shades = torch.cat([coarse(images) for images in parts]).double()
        variances, components = torch.linalg.eigh(shades.T.cov())  # ascending
        spread = variances.clamp(min=1e-6 * float(variances[-1])).sqrt()
        whitening = (components / spread)[:, -DIMENSIONS:]
        self.mean.copy_(shades.mean(0))
        self.directions.copy_(whitening @ self.rows.double().T)

    def forward(
        self,
        images: Tensor,  # float32 [M, C, H, W]
    ) -> Tensor:  # float32 [M, num_classes]
        """The answer to each image, rows of sum 1."""
        return (SHARPNESS * (coarse(images) - self.mean) @ self.directions).softmax(1)


def coarse(
    images: Tensor,  # float32 [M, C, H, W]
) -> Tensor:  # [M, C · 16]
    """Images of 4 x 4, flat; each row with mean 0 and, unless all is of one shade, length 1."""
    shades = F.adaptive_avg_pool2d(images, GRID).flatten(1)
    shades = shades - shades.mean(1, keepdim=True)
    return shades / shades.norm(dim=1, keepdim=True).clamp(min=1e-3)
