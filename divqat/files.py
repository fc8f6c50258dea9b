"""Files that are either whole or absent: everything divqat writes goes through here."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divqat.bounds import MAX_MODEL, MAX_TABLE, MAX_UNFOLDED, check_file, check_unfolded


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write(temporary)`` and move the result to ``path`` in one step.

    The temporary file lies beside ``path`` (``os.replace`` is atomic only within a file system)
    and keeps its suffix. It is removed when ``write`` raises; ``path`` is then left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = new_file(path.parent, f".{path.stem}-", path.suffix)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def new_file(folder: Path, prefix: str, suffix: str) -> Path:
    """An empty file of a new name, with the permissions of any new file.

    Those of :mod:`tempfile` are private, and to find out what others get, one would have to set the
    umask of the whole process, in which other threads write files.
    """
    path = folder / f"{prefix}{secrets.token_hex(8)}{suffix}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON atomically; NaN and Inf are refused (they are no JSON)."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    check_file(path, MAX_TABLE)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> Path:
    """``torch.save`` atomically. ``state`` may hold tensors, numbers, strings, lists and dicts."""
    return write_atomic(path, lambda file: torch.save(state, file))


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
        state = torch.load(path, map_location=map_location, weights_only=True)
        check_unfolded(state, MAX_UNFOLDED * (2**16 + os.path.getsize(path)), _plain_parts)
    except Exception as error:
        raise ValueError(f"{path} is not a readable divqat checkpoint: {error}") from error
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
    """See :func:`divqat.bounds.check_unfolded`."""
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
    """The content of ``path`` if it was made from ``source`` (and ``product`` is there), else that
    of ``make()``, which is written to ``path`` with ``source`` and the seconds it took."""
    if path.is_file() and (product is None or product.is_file()):
        done = read_json(path)
        if done.get("source") == source:
            return done
    start = time.perf_counter()
    done = dict(make())
    done |= {"source": source, "seconds": time.perf_counter() - start}
    write_json(path, done)
    return done


def file_fingerprint(path: Path) -> str:
    """16 hexadecimal digits that identify a model's file."""
    check_file(path, MAX_MODEL)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
