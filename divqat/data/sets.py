"""What a data set is: images, labels and three splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class DataNotFound(FileNotFoundError):
    """A data set is not on this machine; the message says which command brings it."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labeled images.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], not negative.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, different lengths or a negative label.
    """

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {self.images.dtype}")
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {self.labels.dtype}")
        if self.images.dim() != 4:
            raise ValueError(f"images must be [N, C, H, W], got {list(self.images.shape)}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be [{len(self.images)}], one per image, got {list(self.labels.shape)}"
            )
        if len(self) and self.labels.min() < 0:
            raise ValueError(f"labels must not be negative, got {int(self.labels.min())}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor | slice) -> ImageSet:
        """The images at ``indices``: int64 [M], bool [N] or a slice."""
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set: its name, its classes and three disjoint sets of images of one shape.

    Raises:
        ValueError: image shapes differ between the splits, or a label has no class.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def __post_init__(self) -> None:
        shape = self.train.images.shape[1:]
        for split in ("train", "validation", "test"):
            data: ImageSet = getattr(self, split)
            if data.images.shape[1:] != shape:
                raise ValueError(
                    f"{split} images must be {list(shape)} as in train, "
                    f"got {list(data.images.shape[1:])}"
                )
            if len(data) and data.labels.max() >= self.num_classes:
                raise ValueError(
                    f"{split} labels must be below {self.num_classes}, the number of classes, "
                    f"got {int(data.labels.max())}"
                )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.train.images.shape[2], self.train.images.shape[3]


def hold_out(
    data: ImageSet, fraction: float, *, groups: Tensor | None = None, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """Split ``data`` into (rest, held out) with ``fraction`` of every class held out.

    Args:
        data: the images.
        fraction: in [0, 1), rounded to whole groups class by class.
        groups: int64 [N]; images of one class and group stay together (frames of one video).
        seed: the split depends on it and on the labels alone.

    Returns:
        Both parts in the order of ``data``.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    groups = torch.arange(len(data)) if groups is None else groups
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(data), dtype=torch.bool)
    for label in data.labels.unique():
        members = data.labels == label
        names = groups[members].unique()
        chosen = names[torch.randperm(len(names), generator=generator)]
        held |= members & torch.isin(groups, chosen[: round(fraction * len(names))])
    return data.subset(~held), data.subset(held)
