"""What a file that somebody else made may be: a file, in its folder, no larger than its purpose
needs. SECURITY.md says what that protects from."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_SETTINGS = 2**16  # bytes of YAML: a study has 5 KiB, and PyYAML reads this in seconds
MAX_TABLE = 2**26  # bytes of JSON, CSV or a list of names; 0.5 MiB are a study of 1,000 attacks
MAX_IMAGES = 2**30  # bytes of one file of images, unpacked; EMNIST, the largest in use, has half
MAX_MODEL = 2**31  # bytes of an ONNX file: its format has no larger ones
MAX_PIXELS = 2**26  # of a picture, a JPEG's after it is decoded smaller: no camera has more
MAX_INPUT = 2**24  # numbers of one image that a network takes: gigabytes of activations
MAX_UNFOLDED = 16  # times its size: what a file may hold where parts of it are used repeatedly
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}  # fmt: skip


def check_file(path: str | Path, most: int | None = None) -> None:
    """Refuse what is no file: to open a pipe waits for ever, a device has no end.

    Args:
        path: where links lead to counts.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is nothing. ValueError: it is something else, or too large.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path}: wanted a file, got {_kind(state.st_mode)}")
    if most is not None and state.st_size > most:
        raise ValueError(f"{path}: wanted at most {most} bytes, got {state.st_size}")


def check_inside(path: str | Path, root: str | Path) -> None:
    """Refuse a path that leads out of ``root``, and what is neither a file nor a folder. Nothing at
    all is let pass.

    Raises:
        ValueError: it is such a thing.
    """
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            return
        if stat.S_ISLNK(mode):
            target = os.path.realpath(path)
            if not Path(target).is_relative_to(os.path.realpath(root)):
                raise ValueError(
                    f"{path} is a link that leads out of {root}, to {target}: put a copy there"
                )
            mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:  # links in a circle
        raise ValueError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: wanted a file, got {_kind(mode)}")


def check_tree(root: str | Path) -> None:
    """:func:`check_inside` of all that is in a folder, where there is one."""
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            check_inside(os.path.join(folder, name), root)


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "something else")


def check_unfolded(
    value: Any, most: int, parts: Callable[[Any], tuple[int, Sequence[Any]]]
) -> None:
    """Refuse a value that is small only as long as nobody looks at all of it: lists of lists of the
    same list.

    Args:
        value: the value.
        most: how large it may be, where each part counts as often as it occurs.
        parts: the size of a value without what it holds, and what it holds.

    Raises:
        ValueError: it is larger, or holds itself.
    """
    sizes, begun, path = dict[int, int](), set[int](), [value]
    while path:  # not a recursion, as values may lie deep
        node = path[-1]
        size, inner = parts(node)
        if id(node) in sizes:
            path.pop()
        elif id(node) in begun:
            size += sum(sizes[id(part)] for part in inner)
            sizes[id(node)] = min(size, most + 1)  # it can have more digits than there is memory
            path.pop()
        else:
            begun.add(id(node))
            missing = [part for part in inner if id(part) not in sizes]
            if any(id(part) in begun for part in missing):
                raise ValueError("it holds itself")
            path += missing
    if sizes[id(value)] > most:
        raise ValueError(f"what is used in it repeatedly unfolds to more than {most} bytes")
