"""Temporary files: hidden, with a suffix that nothing reads. Leftovers of killed processes can be
recognized."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
from pathlib import Path

# Distinguishes a process from a killed predecessor, which in a container often has the same number.
_LIFE = secrets.token_hex(4)
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_NAME = re.compile(rf"\.divqat-{_HOST}-(\d+)-([0-9a-f]{{8}})-.*\.tmp")


def make_temporary(folder: Path) -> Path:
    """A new empty file in ``folder``, with the usual permissions. Leftovers of dead processes of
    this machine are removed.

    Its name, ``.divqat-<host>-<process>-<life>-<random>.tmp``, matches no pattern of a result.
    """
    _remove_dead(folder, os.listdir(folder))
    prefix = f".divqat-{_HOST}-{os.getpid()}-{_LIFE}-"
    # Not with tempfile, whose files are private: finding out the usual permissions needs a change
    # of the umask of the whole process, in which other threads write files.
    path = folder / f"{prefix}{secrets.token_hex(8)}.tmp"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def remove_dead(root: Path) -> None:
    """Remove leftovers of dead processes of this machine below ``root``, if it exists."""
    for folder, _, names in os.walk(root):
        _remove_dead(Path(folder), names)


def _remove_dead(folder: Path, names: list[str]) -> None:
    for name in names:
        writer = _NAME.fullmatch(name)
        if writer and not _alive(int(writer[1]), writer[2]):
            with contextlib.suppress(OSError):  # another process was faster, or it is not ours
                (folder / name).unlink()


def _alive(process: int, life: str) -> bool:
    if process == os.getpid():
        return life == _LIFE
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
