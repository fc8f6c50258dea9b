"""Files that are either whole or absent: everything divqat writes goes through here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write(temporary)`` and move the result to ``path`` in one step.

    The temporary file lies beside ``path`` (``os.replace`` is atomic only within a file system)
    and keeps its suffix. It is removed when ``write`` raises; ``path`` is then left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes the file private; a published file gets the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON atomically; NaN and Inf are refused (they are no JSON)."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> Path:
    """``torch.save`` atomically. ``state`` may hold tensors, numbers, strings, lists and dicts."""
    return write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote, without running any pickled code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint or holds something other than plain data.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable divqat checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, wanted a dict")
    return state


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
    """16 hexadecimal digits that identify a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
