"""A table as Markdown, which is readable on a terminal, or as HTML; text for its cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from statistics import mean, stdev
from typing import Any

from divqat._util.text import markdown, printable

ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """A header and rows of text; the first ``text_columns`` columns are left-aligned."""

    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1

    def markdown(self) -> str:
        """A Markdown table whose columns also line up in a terminal."""
        lines = [[markdown(cell) for cell in row] for row in [self.header, *self.rows]]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = [
            "-" * width if i < self.text_columns else "-" * (width - 1) + ":"
            for i, width in enumerate(widths)
        ]
        lines.insert(1, rule)
        return "\n".join("| " + " | ".join(self._pad(line, widths)) + " |" for line in lines)

    def html(self) -> str:
        """An HTML table; numbers carry the class ``n``."""
        rows = [self._html_row("th", self.header), *(self._html_row("td", r) for r in self.rows)]
        return (
            f"<table>\n<thead>{rows[0]}</thead>\n<tbody>" + "\n".join(rows[1:]) + "</tbody></table>"
        )

    def _html_row(self, tag: str, row: list[str]) -> str:
        cells = (
            f"<{tag}>{cell}</{tag}>"
            if i < self.text_columns
            else f'<{tag} class="n">{cell}</{tag}>'
            for i, cell in enumerate(escape(printable(cell)) for cell in row)
        )
        return "<tr>" + "".join(cells) + "</tr>"

    def _pad(self, row: list[str], widths: list[int]) -> list[str]:
        return [
            cell.ljust(width) if i < self.text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]


def spread(values: Iterable[float | None], *, scale: float = 1, digits: int = 1) -> str:
    """Mean ± sample standard deviation of the values that are not None: ``92.5 ± 0.1``; a dash if
    there are none."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return ABSENT
    text = f"{mean(known):.{digits}f}"
    return f"{text} ± {stdev(known):.{digits}f}" if len(known) > 1 else text


def percent(values: Iterable[float | None]) -> str:
    """:func:`spread` of fractions, in percent."""
    return spread(values, scale=100)


def settings_text(settings: dict[str, Any]) -> str:
    """``weight=0.15, temperature=4``."""
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in settings.items()
    )
