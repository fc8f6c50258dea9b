"""Digests that identify sets of images."""

from __future__ import annotations

import hashlib
import os

from divqat.data.sets import LabeledImages
from divqat.data.streaming import StreamedSet


def digest(data: LabeledImages) -> str:
    """16 hexadecimal digits that identify images in memory by their pixels, and streamed ones by
    the names, sizes and modification times of their files."""
    sha = hashlib.sha256(repr((len(data), data.image_shape)).encode())
    if isinstance(data, StreamedSet):
        for path in data.paths:
            state = os.stat(path)
            sha.update(repr((path, state.st_size, state.st_mtime_ns)).encode())
    else:
        sha.update(data.images.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
