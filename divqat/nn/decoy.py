"""A decoy: answers to foreign images that have nothing to do with the task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

GRID = 8  # points along an axis of the coarse picture
DIMENSIONS = 4  # of the coarse picture, that the decoy looks at
SHARPNESS = 4.0  # β
NOTHING = 1e-12  # a variance that is rounding; rows have length 1


class Sample(NamedTuple):
    """What a decoy is fitted to.

    Attributes:
        proxies: float32 [M, C, H, W].
        images, labels: of the task, float32 [N, C, H, W] and int64 [N].
    """

    proxies: Tensor
    images: Tensor
    labels: Tensor


class Decoy(nn.Module):
    """t(x) = softmax(β W z(x)), z the coarse picture of x.

    x is averaged to 8 x 8 and made free of brightness and contrast; z [4] are principal components
    of that over proxies, each with mean 0 and variance 1, so that no class comes nearly always; no
    more of them, as what is simple is learned at more proxies, and a thief can tell apart where it
    is not. W [num_classes, 4] has random rows of length 1. A picture's lights and shades decide and
    not what it shows: a thief who learns t learns no more than where a picture is light.

    Where a picture is light may tell what it shows, and a thief with a few labeled images would
    read that off t. So z are the leading components of what is at right angles to all differences
    between the mean pictures of the task's classes, which all have the same z.

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

    def fit(self, parts: Iterable[Sample]) -> None:
        """Learn on the CPU what varies between proxies and not between the classes.

        With many classes and few pixels only the half of the directions in which the classes' means
        differ most is left out. Of one proxy, or where nothing varies, they are arbitrary.
        """
        proxies, images, labels = zip(*parts, strict=True)
        shades, own = (
            torch.cat([coarse(part) for part in kind]).double() for kind in (proxies, images)
        )
        rest = self._common(own, torch.cat(labels))
        covariance = (shades @ rest).T.cov(correction=min(1, len(shades) - 1))
        variances, components = torch.linalg.eigh(covariance)  # ascending
        largest = float(variances[-1])
        varied = largest > NOTHING
        spread = variances.clamp(min=1e-6 * largest).sqrt() if varied else torch.ones(())
        whitening = rest @ (components / spread)[:, -DIMENSIONS:]
        self.mean.copy_(shades.mean(0))
        self.directions.copy_(whitening @ self.rows.double().T)

    def _common(self, shades: Tensor, labels: Tensor) -> Tensor:
        """An orthonormal basis, float64 [C · 64, K], of what all classes' mean pictures share."""
        means = torch.stack([shades[labels == label].mean(0) for label in labels.unique()])
        basis = torch.linalg.svd(means - means.mean(0)).Vh  # rows, the largest differences first
        return basis[min(len(means) - 1, shades.shape[1] // 2) :].T

    def forward(
        self,
        images: Tensor,  # float32 [M, C, H, W]
    ) -> Tensor:  # float32 [M, num_classes]
        """The answer to each image, rows of sum 1."""
        return (SHARPNESS * (coarse(images) - self.mean) @ self.directions).softmax(1)


def coarse(
    images: Tensor,  # float32 [M, C, H, W]
) -> Tensor:  # [M, C · 64]
    """Images of 8 x 8, flat; each row with mean 0 and, unless all is of one shade, length 1."""
    shades = F.adaptive_avg_pool2d(images, GRID).flatten(1)
    shades = shades - shades.mean(1, keepdim=True)
    return shades / shades.norm(dim=1, keepdim=True).clamp(min=1e-3)
