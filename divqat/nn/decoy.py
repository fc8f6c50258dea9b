"""A decoy: answers to foreign images that are unrelated to the task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

GRID = 8  # points along an axis of the coarse picture
DIMENSIONS = 4  # components of the coarse picture that the decoy uses
SHARPNESS = 4.0  # β
NEGLIGIBLE = 1e-12  # a variance of rounding errors only; rows have length 1


class Sample(NamedTuple):
    """Images to which a decoy is fitted.

    Attributes:
        proxies: float32 [M, C, H, W].
        images, labels: those of the task, float32 [N, C, H, W] and int64 [N].
    """

    proxies: Tensor
    images: Tensor
    labels: Tensor


class Decoy(nn.Module):
    """t(x) = softmax(β W z(x)), with four components z(x) of the coarse picture of x.

    The coarse picture is x averaged to 8 x 8, without brightness and contrast. z [4] are principal
    components of it over proxies, each with mean 0 and variance 1, so that no class dominates. Only
    four are used: the network learns a simple t on more proxies, and an attacker could recognize
    the images on which it did not. W [num_classes, 4] has random rows of length 1. Hence t depends
    on the distribution of brightness and not on the content of an image: an attacker who learns t
    learns only where an image is bright.

    The distribution of brightness may still reveal the class, and an attacker with a few labeled
    images could read that from t. So z are the leading components in the subspace that is
    orthogonal to all differences between the mean pictures of the task's classes: the mean pictures
    all have the same z.

    A constant class would reveal as little, but a network is only approximately constant, and an
    attacker could amplify the deviations. For the same reason t is not a single class: if a network
    only suppressed the right class, the order of the others would still depend on the task, and an
    attacker could learn from it. Here the brightness decides their order, too.

    Args:
        num_classes: at least 2.
        channels: of the images.
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
        """Find, on the CPU, the components that vary between proxies but not between class means.

        With many classes and few pixels, only the half of the directions in which the class means
        differ most is excluded. If there is one proxy, or no variance, the components are
        arbitrary.
        """
        proxies, images, labels = zip(*parts, strict=True)
        pictures, task_pictures = (
            torch.cat([coarse_picture(part) for part in batches]).double()
            for batches in (proxies, images)
        )
        basis = self._common_subspace(task_pictures, torch.cat(labels))
        covariance = (pictures @ basis).T.cov(correction=min(1, len(pictures) - 1))
        variances, components = torch.linalg.eigh(covariance)  # ascending
        largest = float(variances[-1])
        varies = largest > NEGLIGIBLE
        deviation = variances.clamp(min=1e-6 * largest).sqrt() if varies else torch.ones(())
        whitening = basis @ (components / deviation)[:, -DIMENSIONS:]
        self.mean.copy_(pictures.mean(0))
        self.directions.copy_(whitening @ self.rows.double().T)

    def _common_subspace(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """An orthonormal basis, float64 [C · 64, K], of the subspace in which the mean pictures of
        all classes are equal."""
        means = torch.stack([pictures[labels == label].mean(0) for label in labels.unique()])
        basis = torch.linalg.svd(means - means.mean(0)).Vh  # rows, the largest differences first
        return basis[min(len(means) - 1, pictures.shape[1] // 2) :].T

    def forward(
        self,
        images: Tensor,  # float32 [M, C, H, W]
    ) -> Tensor:  # float32 [M, num_classes]
        """The answer to each image, rows of sum 1."""
        return (SHARPNESS * (coarse_picture(images) - self.mean) @ self.directions).softmax(1)


def coarse_picture(
    images: Tensor,  # float32 [M, C, H, W]
) -> Tensor:  # [M, C · 64]
    """Flattened images of 8 x 8; each row has mean 0 and, unless the image is uniform, length 1."""
    shades = F.adaptive_avg_pool2d(images, GRID).flatten(1)
    shades = shades - shades.mean(1, keepdim=True)
    return shades / shades.norm(dim=1, keepdim=True).clamp(min=1e-3)
