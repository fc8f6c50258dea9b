"""Warnings about data sets that can be trained on but have defects."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from divqat.data.sets import ImageSet, LabeledImages, Splits
from divqat.data.streaming import StreamedSet

TAIL = 4096  # bytes at the end of a picture file, which differ for most files of the same size


def check_classes(splits: Splits) -> list[str]:
    """A line for each split in which some classes have no image.

    Raises:
        ValueError: the training images have fewer than two classes.
    """
    lines = []
    for split in ("train", "test"):
        data: LabeledImages = getattr(splits, split)
        present = set(data.labels.unique().tolist())
        if split == "train" and len(present) < 2:
            names = ", ".join(splits.classes[label] for label in present) or "none"
            raise ValueError(f"{splits.name}: wanted training images of two classes, got {names}")
        absent = [name for label, name in enumerate(splits.classes) if label not in present]
        if absent:
            lines.append(f"{splits.name}: classes without a {split} image: {_shortened(absent)}")
    return lines


def find_copies(splits: Splits) -> list[str]:
    """A line for each split that contains copies of test images, which make the test too easy.

    Decoded images are compared bit by bit; of streamed sets, the files.
    """
    lines = []
    for split in ("train", "validation"):
        copies = _copies(getattr(splits, split), splits.test)
        if copies:
            lines.append(
                f"{splits.name}: {len(copies)} of {len(splits.test)} test images are also in "
                f"{split}: {_shortened(copies)}"
            )
    return lines


def _shortened(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _copies(train: LabeledImages, test: LabeledImages) -> list[str]:
    """The images of ``test`` that are also in ``train``, by number or file."""
    if isinstance(train, StreamedSet) and isinstance(test, StreamedSet):
        return _same_files(train.paths, test.paths)
    if isinstance(train, ImageSet) and isinstance(test, ImageSet):
        known = {digest: number for number, digest in enumerate(_digests(train))}
        return [
            f"{number} (as {known[digest]})"
            for number, digest in enumerate(_digests(test))
            if digest in known
        ]
    return []


def _digests(data: ImageSet) -> list[bytes]:
    images = data.images.cpu().contiguous().numpy()
    return [hashlib.sha256(image).digest() for image in images]


def _same_files(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """Equal files, by size, then by their last bytes, then by their content: a file is read
    only as far as another one matches it."""
    keys: dict[str, tuple[object, ...]] = {path: () for path in (*train, *test)}
    for key in (os.path.getsize, _tail, _content):
        keys |= {path: (*keys[path], key(path)) for path in {*train, *test}}
        shared = {keys[path] for path in train} & {keys[path] for path in test}
        train, test = ([path for path in side if keys[path] in shared] for side in (train, test))
    known = {keys[path]: path for path in train}
    return [f"{path} (as {known[keys[path]]})" for path in test]


def _tail(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL))
        return file.read(TAIL)


def _content(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()
