"""Folders that a run works in: when one is deleted, the run ends and makes no half of it anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from divqat._util.names import check_folder
from divqat._util.temporaries import remove_dead

_held: list[_Held] = []


class FolderLost(FileNotFoundError):
    """A folder was deleted, moved or replaced while something was at work in it."""


@contextmanager
def held(name: str, folder: str | Path) -> Iterator[Path]:
    """A block that works in ``folder``, which is made when something is written to it; what dead
    processes left half-written there is removed.

    Args:
        name: what the folder is called in errors.
        folder: its path.

    Raises:
        FolderLost: it was deleted, moved or replaced in the meantime; noticed when something
            is to be written, and at the end.
        ValueError: its name is empty. NotADirectoryError: it is a file.
    """
    path = check_folder(name, folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{name}: wanted a folder, got the file {path}")
    if not any(place.folder in (path.absolute(), *path.absolute().parents) for place in _held):
        remove_dead(path)  # not again for what lies in a folder that is held
    place = _Held(path)
    _held.append(place)
    try:
        yield path
        place.check()
    except OSError:  # what is not found, perhaps
        place.check()
        raise
    finally:
        _held.remove(place)
        place.close()


def make_parents(path: Path) -> None:
    """Make the folder that ``path`` lies in.

    Raises:
        FolderLost: a folder around it is held, and was deleted.
    """
    around = [place for place in _held if place.folder in path.absolute().parents]
    for place in around:
        place.check()
    path.parent.mkdir(parents=True, exist_ok=True)
    for place in around:
        place.check()


class _Held:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.handle: int | None = None
        self.found: os.stat_result | None = None
        self.check()

    def check(self) -> None:
        """See that the folder is the one that was there first."""
        try:
            now = os.stat(self.folder)
        except FileNotFoundError:
            now = None
        if self.found is None:
            if now is not None and os.name != "nt":
                # While it is open, no other folder gets its number.
                self.handle = os.open(self.folder, os.O_RDONLY)
            self.found = now
        elif now is None or not os.path.samestat(now, self.found):
            raise FolderLost(
                f"{self.folder} was deleted, moved or replaced while it was worked in; what is not "
                "in it any more has to be made again"
            )

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
