"""Texts that somebody else may have written, as texts: on a terminal, in Markdown."""

from __future__ import annotations

import re

# What begins markup in GitHub's Markdown wherever it stands. A _ within a word does not.
MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: object) -> str:
    """The text without what a terminal takes for orders, and without letters that are not seen or
    change the direction of others: ``\\x1b`` in four characters for an escape. Lines stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def markdown(text: str) -> str:
    """The text as Markdown that shows it, in one line."""
    return MARKUP.sub(r"\\\g<0>", printable(" ".join(text.split())))
