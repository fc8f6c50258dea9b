"""Checks of names that become files and folders, so that none leads elsewhere on any system."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\s*(\..*)?", re.IGNORECASE)  # on Windows


def check_name(what: str, name: object) -> str:
    """Return ``name``, if it is a valid name of a single folder.

    Args:
        what: what the name belongs to, for the error.
        name: any value.

    Raises:
        ValueError: it is empty, ``..`` or absolute, has separators or unprintable characters, or is
            reserved on Windows.
    """
    if (
        not isinstance(name, str)
        or not name.strip(". ")  # Windows drops trailing ones
        or not name.isprintable()
        or "/" in name
        or "\\" in name
        or PureWindowsPath(name).drive
        or RESERVED.fullmatch(name)
    ):
        raise ValueError(
            f"{what}: wanted the name of a folder, without separators, not '..' and not reserved, "
            f"got {name!r}"
        )
    return name


def check_folder(what: str, folder: str | Path) -> Path:
    """The path of a folder.

    Raises:
        ValueError: it is empty, which would be the current folder, or contains a NUL.
    """
    if not str(folder).strip() or "\0" in str(folder):
        raise ValueError(f"{what}: wanted the path of a folder ('.': this folder), got {folder!r}")
    return Path(folder)
