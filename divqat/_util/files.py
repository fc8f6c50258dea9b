"""Atomic writes: every file that divqat writes is either complete or absent."""

from __future__ import annotations

import io
import json
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divqat._util.bounds import MAX_MODEL, MAX_TABLE, MAX_UNFOLDED, check_file, check_unfolded
from divqat._util.held import FolderLost, held, make_parents
from divqat._util.integrity import (
    CHANGED,
    check_zip,
    is_intact,
    seal_zip,
    sealed_json,
    sha256,
    unsealed_json,
)
from divqat._util.temporaries import make_temporary

REMEDY = "restore a copy, or delete it and repeat the command that wrote it"


class WriteError(OSError):
    """A file could not be written; its old content is unchanged."""


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write(temporary)`` and move the result to ``path`` in one step.

    The temporary file is in the same folder (``os.replace`` is atomic only within a file system),
    under a unique name. If ``write`` raises, it is removed, and ``path`` does not change.

    Raises:
        WriteError: the disk is full, a permission is missing, a file is in place of a folder ...
        FolderLost: a parent folder that is in use (:func:`divqat._util.held.held`) was deleted.
        Others: those of ``write``.
    """
    path = Path(path)
    try:
        _write_atomic(path, write)
    except FolderLost:
        raise
    except OSError as error:
        raise WriteError(
            f"could not write {path}: {error.strerror or error}; finished results are unchanged: "
            "fix this and repeat the command to resume"
        ) from error
    return path


def _write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    make_parents(path)
    temporary = make_temporary(path.parent)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda file: file.write_bytes(text.encode()))


def write_json(path: str | Path, value: dict[str, Any]) -> Path:
    """Write ``value`` by :func:`compact_json`, atomically, with a checksum as its last key.

    Raises:
        ValueError: NaN or Inf, which are not JSON.
        Others: see :func:`write_atomic`."""
    return write_text(path, sealed_json(value))


def read_json(path: str | Path, kind: type | tuple[type, ...] = dict) -> Any:
    """Read a JSON file without its checksum; ``kind`` is the expected type of its value.

    Raises:
        ValueError: it is damaged (the message names the line, if known), or not of this type.
    """
    check_file(path, MAX_TABLE)
    data = Path(path).read_bytes()
    try:
        value = unsealed_json(data.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}; {REMEDY}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8: {error.reason}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: wanted an object, got {type(value).__name__}; {REMEDY}")
    return _Content(value, path) if isinstance(value, dict) else value


class _Content(dict):
    """The content of a JSON file; a missing key raises an error that names the file."""

    def __init__(self, value: dict[str, Any], path: str | Path) -> None:
        super().__init__(value)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path}: the key {key!r} is missing; {REMEDY}")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> Path:
    """``torch.save`` atomically, with a checksum.

    ``state`` may contain tensors, numbers, strings, lists and dicts.
    """
    # Not directly into the file: torch reports a full disk as "unexpected pos".
    buffer = io.BytesIO()
    torch.save(state, buffer)
    seal_zip(buffer)
    return write_atomic(path, lambda file: file.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Load a file of :func:`save_checkpoint`, without running pickled code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, contains anything but plain data, or expands to much
            more than its size.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        _check_stored(path)
        data = Path(path).read_bytes()
        check_zip(data)
        state = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
        check_unfolded(state, MAX_UNFOLDED * (2**16 + len(data)), _plain_parts)
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable divqat checkpoint: {error}; {REMEDY}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: wanted a dict, got {type(state).__name__}")
    return state


def _check_stored(path: str | Path) -> None:
    """Check that a zip file does not unpack to more than its size; ``torch.save`` does not
    compress."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed")
    if sum(member.file_size for member in members) > os.path.getsize(path):
        raise ValueError("its parts overlap")


def _plain_parts(value: Any) -> tuple[int, list[Any]]:
    """See :func:`divqat._util.bounds.check_unfolded`."""
    if isinstance(value, dict):
        return 1, [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return 1, list(value)
    if isinstance(value, Tensor):  # a view can be larger than its storage
        return 1 + value.numel() * value.element_size(), []
    return 1 + (len(value) if isinstance(value, (str, bytes)) else 8), []


def step(
    path: Path, source: str, make: Callable[[], Mapping[str, Any]], *, product: Path | None = None
) -> dict[str, Any]:
    """Cache a step of a run: the content of ``path`` if it was made from ``source`` and ``product``
    is intact, else the result of ``make()``.

    Args:
        path: a JSON file for the result, with ``source``, the seconds that ``make`` took and the
            checksum of ``product``.
        source: identifies the inputs of the step.
        make: computes the result, and writes ``product``.
        product: a file that the step writes besides its result.
    """
    with held("folder", path.parent):
        if path.is_file() and (product is None or product.is_file()):
            done = read_json(path)
            if done.get("source") == source:
                if product is None or is_intact(product, done):
                    return done
                warnings.warn(f"{product} {CHANGED}: it is rebuilt", stacklevel=2)
        if product is not None:
            path.unlink(missing_ok=True)  # its checksum is that of the old product
        start = time.perf_counter()
        done = dict(make())
        done |= {"source": source, "seconds": time.perf_counter() - start}
        if product is not None:
            done["sha256"] = {product.name: sha256(product)}
        write_json(path, done)
        return done


def check_beside(path: Path, report: str, remedy: str) -> None:
    """Check ``path`` against its checksum in the JSON file ``report`` beside it, if there is one.

    Raises:
        ValueError: the checksum differs; the message ends with ``remedy``.
    """
    beside = path.with_name(report)
    if beside.is_file() and not is_intact(path, read_json(beside)):
        raise ValueError(f"{path} {CHANGED} (its checksum in {report} differs): {remedy}")


def file_fingerprint(path: Path) -> str:
    """16 hexadecimal digits that identify the file of a model, and that of its weights if OpenVINO
    (``.xml``) has these beside it."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    for file in files:
        check_file(file, MAX_MODEL)
    return "".join(sha256(file)[: 16 // len(files)] for file in files)
