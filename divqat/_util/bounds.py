"""Bounds for untrusted files: they must be regular files, inside their folder, and no larger than
their purpose needs. SECURITY.md says what this protects from."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_SETTINGS = 2**16  # bytes of YAML: a study has 5 KiB, and PyYAML reads this in seconds
MAX_TABLE = 2**26  # bytes of JSON, CSV or a list of names; a study of 1,000 attacks has 0.5 MiB
MAX_IMAGES = 2**30  # bytes of one unpacked file of images; EMNIST, the largest in use, has half
MAX_MODEL = 2**31  # bytes of an ONNX file, the limit of the format
MAX_PIXELS = 2**26  # of a picture (of a JPEG at its decoded size); no camera has more
MAX_INPUT = 2**24  # values of one input image: gigabytes of activations
MAX_UNFOLDED = 16  # largest factor by which repeated references in a file may multiply its size
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}  # fmt: skip


def check_file(path: str | Path, most: int | None = None) -> None:
    """Check that ``path`` is a regular file: a pipe may block forever, a device has no end.

    Args:
        path: the file; links are followed.
        most: maximum size in bytes.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not a regular file, or too large.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path}: wanted a file, got {_kind(state.st_mode)}")
    if most is not None and state.st_size > most:
        raise ValueError(f"{path}: wanted at most {most} bytes, got {state.st_size}")


def check_inside(path: str | Path, root: str | Path) -> None:
    """Check that a path does not lead out of ``root`` and is a regular file or a folder. It need
    not exist.

    Raises:
        ValueError: it leads out of ``root``, or is a pipe, a device ...
    """
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            return
        if stat.S_ISLNK(mode):
            target = os.path.realpath(path)
            if not Path(target).is_relative_to(os.path.realpath(root)):
                raise ValueError(
                    f"{path} is a link that leads out of {root}, to {target}: replace it by a copy"
                )
            mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:  # a cycle of links
        raise ValueError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: wanted a file, got {_kind(mode)}")


def check_tree(root: str | Path) -> None:
    """:func:`check_inside` for everything in a folder, if it exists."""
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            check_inside(os.path.join(folder, name), root)


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "something else")


def check_unfolded(
    value: Any, most: int, parts: Callable[[Any], tuple[int, Sequence[Any]]]
) -> None:
    """Check the size of a value in which references are expanded: a list of lists of the same list
    is small in memory, but large when expanded.

    Args:
        value: the value.
        most: maximum size, where each part counts as often as it occurs.
        parts: a function from a value to its own size without its parts, and its parts.

    Raises:
        ValueError: it is larger, or contains itself.
    """
    sizes, begun, path = dict[int, int](), set[int](), [value]
    while path:  # no recursion, as values may be deeply nested
        node = path[-1]
        size, inner = parts(node)
        if id(node) in sizes:
            path.pop()
        elif id(node) in begun:
            size += sum(sizes[id(part)] for part in inner)
            sizes[id(node)] = min(size, most + 1)  # the exact number could fill the memory
            path.pop()
        else:
            begun.add(id(node))
            missing = [part for part in inner if id(part) not in sizes]
            if any(id(part) in begun for part in missing):
                raise ValueError("it contains itself")
            path += missing
    if sizes[id(value)] > most:
        raise ValueError(f"its repeated references expand to more than {most} bytes")
