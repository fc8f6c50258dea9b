"""Output of texts: untrusted ones on a terminal and in Markdown, tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Characters that start markup in GitHub's Markdown anywhere. A _ within a word does not.
MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: object) -> str:
    """The text with unprintable characters escaped: terminal control codes, invisible characters,
    changes of direction. An escape becomes the four characters ``\\x1b``; newlines stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def markdown(text: str) -> str:
    """The text as one line of Markdown, with markup escaped."""
    return MARKUP.sub(r"\\\g<0>", printable(" ".join(text.split())))


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table with aligned columns, and a rule below the first line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    rows = [lines[0], rule, *lines[1:]]
    padded = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)
