"""Progress bars, shown only on a terminal and if tqdm is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_hidden = False


def hide() -> None:
    """Switch off progress bars in this process."""
    global _hidden
    _hidden = True


def progress(
    items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Iterate over ``items`` with a bar on standard error, if one is shown."""
    if is_shown():
        from tqdm import tqdm

        yield from tqdm(items, desc=description, total=total, unit=unit, leave=False)
    else:
        yield from items


def is_shown() -> bool:
    """Whether bars are shown: on a terminal, with tqdm, unless hidden."""
    terminal = not _hidden and sys.stderr is not None and sys.stderr.isatty()
    return terminal and importlib.util.find_spec("tqdm") is not None


def duration(seconds: float) -> str:
    """A time as a reader would say it: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
