"""Readers of the file formats in which image data sets are distributed.

Every reader raises ``ValueError`` naming the file when it is truncated or something else.
"""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from divqat.data.sets import ImageSet
from divqat.errors import require


def read_idx(path: str | Path) -> Tensor:
    """Read an idx file of bytes, plain or ``.gz``: uint8 of the shape that its header states.

    Format: two zero bytes, type (8: unsigned byte), number of dimensions, each dimension as a
    big-endian int32, data (http://yann.lecun.com/exdb/mnist).
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] == 0:
        raise ValueError(f"{path} is not an idx file of bytes: it starts with {raw[:4]!r}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: it ends within its header")
    shape = [int(size) for size in np.frombuffer(raw, ">i4", raw[3], 4)]
    if min(shape) < 0 or len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path} is truncated or damaged: its header promises {shape} bytes, "
            f"{len(raw) - start} follow"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).copy()).view(shape)


def read_idx_pair(images: str | Path, labels: str | Path) -> ImageSet:
    """An MNIST-like pair of idx files: images uint8 [N, 1, H, W] with their labels."""
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.dim() != 3:
        raise ValueError(f"{images} must hold [N, H, W] images, got {list(pixels.shape)}")
    if classes.shape != pixels.shape[:1]:
        raise ValueError(
            f"{labels} must hold {len(pixels)} labels as many as {images} has images, "
            f"got {list(classes.shape)}"
        )
    return ImageSet(pixels[:, None], classes.long())


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain types; any other class or function is refused."""

    # What numpy 1 and 2 need to rebuild an array. `encode` is how Python 3 writes bytes in the
    # protocols that Python 2 can read.
    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")
        if name == "_reconstruct":  # wherever this numpy keeps it
            return np.empty(0).__reduce__()[0]
        if name == "dtype":  # Python 2 wrote two more arguments as integers, which numpy deprecates
            return lambda kind, *flags: np.dtype(kind)
        return super().find_class(module, name)


def load_plain_pickle(file: BinaryIO) -> Any:
    """Unpickle numpy arrays and plain types; strings of Python 2 become bytes.

    Raises:
        pickle.UnpicklingError: the pickle refers to anything else; nothing of it is executed.
    """
    return _PlainUnpickler(file, encoding="bytes").load()


def _cifar_batch(path: Path, label_key: bytes) -> ImageSet:
    with open(path, "rb") as file:
        try:
            content = load_plain_pickle(file)
            data = content[b"data"]
            if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
                raise ValueError(f"data must be uint8 [N, 3072], got {data.dtype} {data.shape}")
            labels = torch.tensor(content[label_key], dtype=torch.int64)
            return ImageSet(torch.tensor(data).view(-1, 3, 32, 32), labels)
        # A damaged pickle raises nearly anything: EOFError, KeyError, IndexError, TypeError ...
        except Exception as error:
            raise ValueError(f"{path} is not a whole CIFAR batch: {error!r}") from error


def read_cifar_names(path: Path, key: bytes = b"") -> tuple[str, ...]:
    """Class names from CIFAR's meta file: ``key`` of a pickle, or ``.txt`` with one per line."""
    if path.suffix == ".txt":
        return tuple(path.read_text(encoding="utf-8").split())
    with open(path, "rb") as file:
        try:
            return tuple(name.decode() for name in load_plain_pickle(file)[key])
        except Exception as error:
            raise ValueError(f"{path} is not a whole CIFAR meta file: {error!r}") from error


def concatenate(parts: Sequence[ImageSet]) -> ImageSet:
    """One set of all ``parts``."""
    return ImageSet(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def read_cifar_pickles(paths: Sequence[Path], label_key: bytes) -> ImageSet:
    """CIFAR "python version" batches: pickled dicts of ``b"data"`` uint8 [N, 3072] and labels.

    Args:
        paths: the batches, read in this order.
        label_key: ``b"labels"`` (CIFAR-10) or ``b"fine_labels"`` (CIFAR-100).
    """
    return concatenate([_cifar_batch(path, label_key) for path in paths])


def read_cifar_binary(paths: Sequence[Path], label_bytes: int) -> ImageSet:
    """CIFAR "binary version" batches: records of ``label_bytes`` labels and 3072 pixels.

    Args:
        paths: the batches, read in this order.
        label_bytes: 1 (CIFAR-10) or 2 (CIFAR-100: coarse, fine); the last one is the label.
    """
    parts = []
    for path in paths:
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % (label_bytes + 3072):
            raise ValueError(
                f"{path} is truncated or no CIFAR binary file: {raw.size} bytes are no multiple "
                f"of {label_bytes + 3072}"
            )
        records = torch.from_numpy(raw).view(-1, label_bytes + 3072)
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        parts.append(ImageSet(images, records[:, label_bytes - 1].long()))
    return concatenate(parts)


def read_svhn(path: str | Path) -> ImageSet:
    """SVHN "cropped digits" ``.mat``: ``X`` [32, 32, 3, N], ``y`` [N, 1] where 10 means zero."""
    loadmat = require("scipy.io", "data").loadmat
    with open(path, "rb") as file:
        try:
            content = loadmat(file)
            pixels, labels = content["X"], content["y"].reshape(-1)
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
                raise ValueError(
                    f"X must be uint8 [32, 32, 3, N], got {pixels.dtype} {list(pixels.shape)}"
                )
            images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
            return ImageSet(images, torch.from_numpy(labels.astype(np.int64) % 10))
        except Exception as error:
            raise ValueError(f"{path} is not a whole SVHN .mat file: {error!r}") from error
