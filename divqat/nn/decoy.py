"""A decoy: answers to foreign images that are unrelated to the task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import shake_256
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

GRID = 8  # points along an axis of the coarse picture
DIMENSIONS = 4  # components of the coarse picture that the decoy uses
SHARPNESS = 4.0  # β
KEY_BYTES = 32
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
        key: W is drawn from it instead, see :func:`keyed_rows`; 64 hexadecimal digits.

    Attributes:
        rows: W, float [num_classes, 4], on the CPU.
        basis: float64 [C · 64, 4], on the CPU, from :meth:`fit`: z(x) is the coarse picture minus
            ``mean``, times ``basis``. It does not depend on W.

    Raises:
        ValueError: ``key`` is not as above.
    """

    mean: Tensor
    directions: Tensor
    basis: Tensor

    def __init__(self, num_classes: int, channels: int, seed: int, key: str | None = None) -> None:
        super().__init__()
        self.is_keyed = key is not None
        if key is None:
            rows = torch.randn(num_classes, DIMENSIONS, generator=Generator().manual_seed(seed))
            self.rows = F.normalize(rows)
        else:
            self.rows = keyed_rows([parse_key(key)], num_classes)[0]
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
        if self.is_keyed:
            # LAPACK may return either sign. The decoy has to be the same on a judge's machine.
            largest_entry = whitening.abs().argmax(0, keepdim=True)
            whitening = whitening * whitening.gather(0, largest_entry).sign()
        self.basis = whitening
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


def parse_key(text: str) -> bytes:
    """The 32 bytes of a key; ValueError if ``text`` is not 64 hexadecimal digits."""
    digits = set("0123456789abcdefABCDEF")
    if len(text) != 2 * KEY_BYTES or not set(text) <= digits:
        raise ValueError(
            f"decoy_key: wanted {2 * KEY_BYTES} hexadecimal digits, got {len(text)} characters"
        )
    return bytes.fromhex(text)


def keyed_rows(
    keys: Sequence[bytes], num_classes: int
) -> Tensor:  # float64 [len(keys), num_classes, 4]
    """W = F(K) of each key: rows of length 1 in directions that are uniform on the sphere.

    SHAKE-256 expands a key to 53-bit uniform numbers, and the Box-Muller transform turns pairs of
    them into the normal numbers of a row. Without the key, W is as unknown as a random matrix.
    """
    count = num_classes * DIMENSIONS
    stream = b"".join(shake_256(b"divqat decoy" + key).digest(16 * count) for key in keys)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64).view(len(keys), 2, count)
    uniform = ((words >> 11 & 2**53 - 1).double() + 0.5) / 2**53  # above 0
    normal = (-2 * uniform[:, 0].log()).sqrt() * (2 * math.pi * uniform[:, 1]).cos()
    return F.normalize(normal.view(len(keys), num_classes, DIMENSIONS), dim=2)


def coarse_picture(
    images: Tensor,  # float32 [M, C, H, W]
) -> Tensor:  # [M, C · 64]
    """Flattened images of 8 x 8; each row has mean 0 and, unless the image is uniform, length 1."""
    shades = F.adaptive_avg_pool2d(images, GRID).flatten(1)
    shades = shades - shades.mean(1, keepdim=True)
    return shades / shades.norm(dim=1, keepdim=True).clamp(min=1e-3)
