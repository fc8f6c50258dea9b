"""Names that become files and folders: none of them leads elsewhere, on any system."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\s*(\..*)?", re.IGNORECASE)  # by Windows


def check_name(what: str, name: object) -> str:
    """Return ``name``, if it is that of one folder below another.

    Args:
        what: what the name is of, for the error.
        name: any text.

    Raises:
        ValueError: it is empty, ``..``, absolute, has separators or characters that do not print,
            or is reserved by Windows.
    """
    if (
        not isinstance(name, str)
        or not name.strip(". ")  # Windows drops those at the end
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
        ValueError: it is empty, which would be the working folder, or holds a NUL.
    """
    if not str(folder).strip() or "\0" in str(folder):
        raise ValueError(f"{what}: wanted the path of a folder ('.' is this one), got {folder!r}")
    return Path(folder)
