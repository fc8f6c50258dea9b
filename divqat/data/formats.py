"""Readers of the file formats in which image data sets are distributed.

Every reader raises a ``ValueError`` that names the file if it is truncated, has another format, or
unpacks to more than ``MAX_IMAGES`` bytes.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from divqat._util.bounds import MAX_IMAGES, MAX_TABLE, check_file
from divqat._util.errors import require
from divqat.data.plain_pickle import load_plain_pickle
from divqat.data.sets import ImageSet


def read_idx(path: str | Path) -> Tensor:
    """Read an idx file of bytes, plain or ``.gz``: uint8 of the shape that its header states.

    Format: two zero bytes, type (8: unsigned byte), number of dimensions, each dimension as a
    big-endian int32, data (http://yann.lecun.com/exdb/mnist).
    """
    path = Path(path)
    check_file(path, MAX_IMAGES)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read(MAX_IMAGES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) > MAX_IMAGES:
        raise ValueError(f"{path}: wanted at most {MAX_IMAGES} bytes unpacked, got more")
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
            f"{labels} must hold {len(pixels)} labels, one per image in {images}, "
            f"got {list(classes.shape)}"
        )
    return ImageSet(pixels[:, None], classes.long())


def _cifar_batch(path: Path, label_key: bytes) -> ImageSet:
    check_file(path, MAX_IMAGES)
    try:
        content = load_plain_pickle(path.read_bytes())
        data, labels = content[b"data"], content[label_key]
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise ValueError(f"data must be uint8 [N, 3072], got {data.dtype} {data.shape}")
        # No nested lists, which could become large tensors.
        if isinstance(labels, list) and not all(type(label) is int for label in labels):
            raise ValueError("labels must be numbers")
        labels = torch.tensor(labels, dtype=torch.int64)
        return ImageSet(torch.tensor(data).view(-1, 3, 32, 32), labels)
    # A damaged pickle may raise anything: EOFError, KeyError, IndexError, TypeError ...
    except Exception as error:
        raise ValueError(f"{path} is not a whole CIFAR batch: {error!r}") from error


def read_cifar_names(path: Path, key: bytes = b"") -> tuple[str, ...]:
    """Class names from CIFAR's meta file: ``key`` of a pickle, or ``.txt`` with one per line."""
    check_file(path, MAX_TABLE)
    try:
        if path.suffix == ".txt":
            return tuple(path.read_text(encoding="utf-8").split())
        return tuple(name.decode() for name in load_plain_pickle(path.read_bytes())[key])
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
        check_file(path, MAX_IMAGES)
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % (label_bytes + 3072):
            raise ValueError(
                f"{path} is truncated or not a CIFAR binary file: {raw.size} bytes are not a "
                f"multiple of {label_bytes + 3072}"
            )
        records = torch.from_numpy(raw).view(-1, label_bytes + 3072)
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        parts.append(ImageSet(images, records[:, label_bytes - 1].long()))
    return concatenate(parts)


def read_svhn(path: str | Path) -> ImageSet:
    """SVHN "cropped digits" ``.mat``: ``X`` [32, 32, 3, N], ``y`` [N, 1] where 10 means zero."""
    scipy = require("scipy.io", "data")
    check_file(path, MAX_IMAGES)
    with open(path, "rb") as file:
        try:
            plain = _unpacked_mat(file)
            # Checked before reading: a struct or a cell allocates the size in its header.
            for name, shape, kind in scipy.whosmat(plain):
                if name == "X" and (kind != "uint8" or len(shape) != 4 or shape[:3] != (32, 32, 3)):
                    raise ValueError(f"X must be uint8 [32, 32, 3, N], got {kind} {list(shape)}")
                if name == "y" and kind not in ("uint8", "double"):
                    raise ValueError(f"y must be numbers, got {kind} {list(shape)}")
            content = scipy.loadmat(plain, variable_names=["X", "y"])
            pixels, labels = content["X"], content["y"].reshape(-1)
            images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
            return ImageSet(images, torch.from_numpy(labels.astype(np.int64) % 10))
        except Exception as error:
            raise ValueError(f"{path} is not a whole SVHN .mat file: {error!r}") from error


def _unpacked_mat(file: BinaryIO) -> BinaryIO:
    """A MATLAB 5 file, decompressed: 128 bytes, then elements of a type, a length and data; type 15
    is another element compressed by zlib (MAT-File Format, MathWorks)."""
    plain = io.BytesIO()
    plain.write(file.read(128))
    if plain.getvalue()[126:128] != b"IM":
        raise ValueError("it is not a little-endian MATLAB 5 file")
    while tag := file.read(8):
        kind, length = struct.unpack("<II", tag)
        data = file.read(length)
        if kind == 15:
            data = zlib.decompressobj().decompress(data, MAX_IMAGES + 1 - plain.tell())
        else:
            plain.write(tag)
        plain.write(data)
        if plain.tell() > MAX_IMAGES:
            raise ValueError(f"wanted at most {MAX_IMAGES} bytes unpacked, got more")
    plain.seek(0)
    return plain
