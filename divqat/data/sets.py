"""Data sets: images, labels and three splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from divqat.data.upload import to_device

S = TypeVar("S", bound="LabeledImages")


class DataNotFound(FileNotFoundError):
    """A data set is not on this machine; the message says how to get it."""


class LabeledImages(Protocol):
    """The interface of a set of images: an :class:`ImageSet` or a ``StreamedSet``."""

    @property
    def images(self) -> Tensor: ...  # uint8 [N, C, H, W]
    @property
    def labels(self) -> Tensor: ...  # int64 [N]
    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # (C, H, W)
    def __len__(self) -> int: ...
    def subset(self: S, indices: Tensor | slice) -> S: ...
    def to(self: S, device: torch.device) -> S: ...
    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]: ...


def check_labels(labels: Tensor, n: int) -> None:
    """Check that labels are int64 [n] and not negative.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or a negative label.
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"labels must be [{n}], one per image, got {list(labels.shape)}")
    if n and labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labeled images in the memory of the host or a device.

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
        if self.images.dim() != 4:
            raise ValueError(f"images must be [N, C, H, W], got {list(self.images.shape)}")
        check_labels(self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor | slice) -> ImageSet:
        """The images at ``indices``: int64 [M], bool [N] or a slice."""
        return ImageSet(self.images[indices], self.labels[indices])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    def to(self, device: torch.device) -> ImageSet:
        """The same set on ``device``."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of given rows.

        Args:
            rows: int64 [M] on the CPU, those of the first batch, of the second, and so on.
            lengths: the size of each batch; their sum is M.

        Yields:
            images uint8 [length, C, H, W] and labels int64 [length] on the set's device.
        """
        # One upload of all indices, so that no batch waits for its own.
        for index in to_device(rows, self.images.device).split(list(lengths)):
            yield self.images[index], self.labels[index]


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set: its name, its classes and three disjoint sets of images of one shape.

    Args:
        name: of the data set.
        classes: the names of the classes.
        train, validation, test: the images, with labels below the number of classes.

    Raises:
        TypeError: ``classes`` is not a tuple of strings.
        ValueError: image shapes differ between the splits, or a label has no class.
    """

    name: str
    classes: tuple[str, ...]
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple) or not all(
            isinstance(name, str) for name in self.classes
        ):
            raise TypeError(f"classes: wanted a tuple of their names, got {self.classes!r}")
        shape = self.train.image_shape
        for split in ("train", "validation", "test"):
            data: LabeledImages = getattr(self, split)
            if data.image_shape != shape:
                raise ValueError(
                    f"{split} images must be {list(shape)} as in train, "
                    f"got {list(data.image_shape)}"
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
        return self.train.image_shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.train.image_shape[1:]


def hold_out(
    data: S, fraction: float, *, groups: Tensor | None = None, seed: int = 0
) -> tuple[S, S]:
    """Split ``data`` into (rest, held out) with ``fraction`` of every class held out.

    Args:
        data: the images.
        fraction: in [0, 1), rounded to whole groups class by class.
        groups: int64 [N]; images of one class and group stay together (frames of one video).
        seed: of the split, which depends only on it, the labels and the groups.

    Returns:
        Both parts, in the order of ``data``.

    Raises:
        ValueError: ``fraction`` is out of range.
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
