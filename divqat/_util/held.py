"""Working folders of a run: if one is deleted, the run ends instead of recreating a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from divqat._util.names import check_folder
from divqat._util.temporaries import remove_dead

_held: list[_Held] = []


class FolderLost(FileNotFoundError):
    """A working folder was deleted, moved or replaced during a run."""


@contextmanager
def held(name: str, folder: str | Path) -> Iterator[Path]:
    """A block that works in ``folder``, which is created by the first write. Temporary files of
    dead processes are removed.

    Args:
        name: of the folder in errors.
        folder: its path.

    Raises:
        FolderLost: it was deleted, moved or replaced in the meantime; checked at every write and at
            the end.
        ValueError: its path is empty.
        NotADirectoryError: it is a file.
    """
    path = check_folder(name, folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{name}: wanted a folder, got the file {path}")
    if not any(place.folder in (path.absolute(), *path.absolute().parents) for place in _held):
        remove_dead(path)  # done already for folders inside a held one
    place = _Held(path)
    _held.append(place)
    try:
        yield path
        place.check()
    except OSError:  # perhaps because the folder is gone
        place.check()
        raise
    finally:
        _held.remove(place)
        place.close()


def make_parents(path: Path) -> None:
    """Create the parent folder of ``path``.

    Raises:
        FolderLost: one of its parents is a working folder that was deleted.
    """
    parents = [place for place in _held if place.folder in path.absolute().parents]
    for place in parents:
        place.check()
    path.parent.mkdir(parents=True, exist_ok=True)
    for place in parents:
        place.check()


class _Held:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.handle: int | None = None
        self.original: os.stat_result | None = None
        self.check()

    def check(self) -> None:
        """Check that the folder is still the original one."""
        try:
            now = os.stat(self.folder)
        except FileNotFoundError:
            now = None
        if self.original is None:
            if now is not None and os.name != "nt":
                # While it is open, no other folder gets its inode number.
                self.handle = os.open(self.folder, os.O_RDONLY)
            self.original = now
        elif now is None or not os.path.samestat(now, self.original):
            raise FolderLost(
                f"{self.folder} was deleted, moved or replaced while it was in use; missing "
                "results have to be computed again"
            )

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
