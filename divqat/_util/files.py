"""Files that are either whole or absent: everything divqat writes goes through here."""

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

REMEDY = "bring back a copy, or delete it and give the command that wrote it again"


class WriteError(OSError):
    """A file could not be written; what was there before is as it was."""


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write(temporary)`` and move the result to ``path`` in one step.

    The temporary file lies beside ``path`` (``os.replace`` is atomic only within a file system),
    with a name of its own. It is removed when ``write`` raises; ``path`` is then left as it was.

    Raises:
        WriteError: there is no room, no permission, a file where a folder should be ...
        FolderLost: a folder around it, :func:`divqat._util.held.held`, was deleted.
        Others: as ``write``.
    """
    path = Path(path)
    try:
        _write_atomic(path, write)
    except FolderLost:
        raise
    except OSError as error:
        raise WriteError(
            f"could not write {path}: {error.strerror or error}; what was finished before is as it "
            "was: when that is mended, the same command goes on"
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
    """Write ``value`` as :func:`compact_json` atomically, with a checksum as its last key; NaN and
    Inf are refused (they are no JSON)."""
    return write_text(path, sealed_json(value))


def read_json(path: str | Path, kind: type | tuple[type, ...] = dict) -> Any:
    """Read a JSON file, an object unless ``kind`` says otherwise, without its checksum.

    Raises:
        ValueError: it is damaged; the message names the line where that shows.
    """
    check_file(path, MAX_TABLE)
    data = Path(path).read_bytes()
    try:
        value = unsealed_json(data.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no JSON: {error.msg}; {REMEDY}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: no UTF-8: {error.reason}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: wanted an object, got {type(value).__name__}; {REMEDY}")
    return _Content(value, path) if isinstance(value, dict) else value


class _Content(dict):
    """What a JSON file says; that it lacks a key is an error that names the file."""

    def __init__(self, value: dict[str, Any], path: str | Path) -> None:
        super().__init__(value)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path}: there is no {key!r}; {REMEDY}")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> Path:
    """``torch.save`` atomically, with a checksum.

    ``state`` may hold tensors, numbers, strings, lists and dicts.
    """
    # Not into the file: that a disk is full is an "unexpected pos" to torch.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    seal_zip(buffer)
    return write_atomic(path, lambda file: file.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote, without running any pickled code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, holds something other than plain data, or more
            than its size.
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
        raise ValueError(f"{path} holds a {type(state).__name__}, wanted a dict")
    return state


def _check_stored(path: str | Path) -> None:
    """Refuse a zip file that unpacks to more than it is; ``torch.save`` compresses nothing."""
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
    if isinstance(value, Tensor):  # a view can be larger than what it views
        return 1 + value.numel() * value.element_size(), []
    return 1 + (len(value) if isinstance(value, (str, bytes)) else 8), []


def step(
    path: Path, source: str, make: Callable[[], Mapping[str, Any]], *, product: Path | None = None
) -> dict[str, Any]:
    """The content of ``path`` if it was made from ``source`` (and ``product`` is there as it was
    written), else that of ``make()``, which is written to ``path`` with ``source``, the seconds it
    took and the checksum of ``product``."""
    with held("folder", path.parent):
        if path.is_file() and (product is None or product.is_file()):
            done = read_json(path)
            if done.get("source") == source:
                if product is None or is_intact(product, done):
                    return done
                warnings.warn(f"{product} {CHANGED}: it is made again", stacklevel=2)
        if product is not None:
            path.unlink(missing_ok=True)  # it would have the checksum of another one
        start = time.perf_counter()
        done = dict(make())
        done |= {"source": source, "seconds": time.perf_counter() - start}
        if product is not None:
            done["sha256"] = {product.name: sha256(product)}
        write_json(path, done)
        return done


def check_beside(path: Path, report: str, remedy: str) -> None:
    """See that ``path`` is as the JSON file ``report`` beside it, where there is one, says.

    Raises:
        ValueError: it is not; the message ends with ``remedy``.
    """
    beside = path.with_name(report)
    if beside.is_file() and not is_intact(path, read_json(beside)):
        raise ValueError(f"{path} {CHANGED} (its checksum in {report} is another): {remedy}")


def file_fingerprint(path: Path) -> str:
    """16 hexadecimal digits that identify a model's file."""
    check_file(path, MAX_MODEL)
    return sha256(path)[:16]
