"""What a command says while it works and at its end: how long, where the results are, what next."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from divqat._util.progress import duration
from divqat._util.text import printable

EPOCH = re.compile(r"\bepoch +(\d+)/(\d+) ")  # in a line of divqat.train.run


def ending(results: str | Path, following: Sequence[str | Path]) -> None:
    """Print the last two lines of a command.

    Args:
        results: where they are.
        following: the command to run next, in words.
    """
    print(f"results  {printable(str(results))}")
    print(f"next     {printable(shlex.join(map(str, following)))}")


def browser(page: str | Path) -> list[str | Path]:
    """The command that opens a page in the browser."""
    return ["python3", "-m", "webbrowser", page]


def beside(folder: str | Path, name: str) -> Path:
    """Another folder beside this one, which has another name."""
    folder = Path(folder)
    return folder.with_name(name if folder.name != name else f"{name}-2")


class Pace:
    """Prints the lines of trainings, and after each epoch how long the training will take.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.before = clock, clock()

    def __call__(self, line: str) -> None:
        now = self.clock()
        found = EPOCH.search(line)
        left = int(found[2]) - int(found[1]) if found else 0
        if left:
            line += f"  {duration(left * (now - self.before))} left"
        self.before = now
        print(line, flush=True)
