"""Safe output of untrusted texts: on a terminal, in Markdown."""

from __future__ import annotations

import re

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
