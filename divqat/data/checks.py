"""What is wrong with a data set, although it can be trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from divqat.data.sets import ImageSet, LabeledImages, Splits
from divqat.data.streaming import StreamedSet

TAIL = 4096  # bytes at the end of a picture file, which tell most of one size apart


def check_classes(splits: Splits) -> list[str]:
    """A line for each split with classes that have no image there.

    Raises:
        ValueError: there are no two classes to train on.
    """
    found = []
    for split in ("train", "test"):
        data: LabeledImages = getattr(splits, split)
        present = set(data.labels.unique().tolist())
        if split == "train" and len(present) < 2:
            names = ", ".join(splits.classes[label] for label in present) or "none"
            raise ValueError(f"{splits.name}: wanted training images of two classes, got {names}")
        absent = [name for label, name in enumerate(splits.classes) if label not in present]
        if absent:
            found.append(f"{splits.name}: classes without a {split} image: {_some(absent)}")
    return found


def find_copies(splits: Splits) -> list[str]:
    """A line for each split that test images are in as well, which makes the test too easy.

    They are compared bit by bit: the decoded images, or of streamed ones the files.
    """
    found = []
    for split in ("train", "validation"):
        copies = _copies(getattr(splits, split), splits.test)
        if copies:
            found.append(
                f"{splits.name}: {len(copies)} of {len(splits.test)} test images are in {split} as "
                f"well: {_some(copies)}"
            )
    return found


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _copies(train: LabeledImages, test: LabeledImages) -> list[str]:
    """Which images of ``test`` are in ``train``, by their numbers or files."""
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
    """Files are read only as far as others look like them: by size, by their ends, as a whole."""
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
