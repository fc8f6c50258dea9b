"""What identifies images."""

from __future__ import annotations

import hashlib
import os

from divqat.data.sets import LabeledImages
from divqat.data.streaming import StreamedSet


def digest(data: LabeledImages) -> str:
    """16 hexadecimal digits that identify the images: their pixels; of files names, sizes and times
    of change."""
    found = hashlib.sha256(repr((len(data), data.image_shape)).encode())
    if isinstance(data, StreamedSet):
        for path in data.paths:
            state = os.stat(path)
            found.update(repr((path, state.st_size, state.st_mtime_ns)).encode())
    else:
        found.update(data.images.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
