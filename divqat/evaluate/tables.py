"""Tables of a result, readable as Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from statistics import mean, stdev
from typing import Any

from divqat.evaluate.result import HARD, SOFT, Confidence, Result, VictimResult
from divqat.text import markdown, printable

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
    """Mean ± sample standard deviation of what is there: ``92.5 ± 0.1``; a dash for nothing."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return ABSENT
    text = f"{mean(known):.{digits}f}"
    return f"{text} ± {stdev(known):.{digits}f}" if len(known) > 1 else text


def percent(values: Iterable[float | None]) -> str:
    """:func:`spread` of fractions, in percent."""
    return spread(values, scale=100)


def results_table(result: Result) -> str:
    """The main table and the label-only floor as Markdown, in percent, mean ± std over seeds."""
    return f"{main_table(result).markdown()}\n\n{floor_line(result)}"


def main_table(result: Result) -> Table:
    """Victim accuracy beside clone accuracy and fidelity, one row per victim."""
    header = "Victim|Method|FP acc|Deployed acc|Agreement|Clone soft|Clone hard|Best clone"
    rows = [
        [
            name,
            _method(runs),
            percent(v.accuracy_fp for v in runs),
            percent(v.accuracy for v in runs),
            percent(v.argmax_agreement for v in runs),
            percent(v.clone(SOFT) for v in runs),
            percent(v.clone(HARD) for v in runs),
            percent(v.best for v in runs),
            percent(v.clone(SOFT, "fidelity") for v in runs),
            percent(v.clone(HARD, "fidelity") for v in runs),
        ]
        for name, runs in result.by_victim.items()
    ]
    return Table([*header.split("|"), "Fidelity soft", "Fidelity hard"], rows, text_columns=2)


def floor_line(result: Result) -> str:
    """The accuracy that a victim which shows labels only, and is not defended, gives away."""
    if not result.floor:
        return "Label-only floor: unknown, no hard-label attack on plain QAT was run."
    return f"Label-only floor (hard-label clone of plain QAT): {percent(result.floor)} %"


def attacks_table(result: Result) -> Table:
    """Every attack: one row per victim and answer."""
    rows = []
    for name, runs in result.by_victim.items():
        for answer in dict.fromkeys(answer for v in runs for answer in v.attacks):
            ratio = [
                v.attacks[answer].accuracy / v.accuracy
                for v in runs
                if answer in v.attacks and v.accuracy
            ]
            rows.append(
                [
                    name,
                    answer,
                    percent(v.clone(answer) for v in runs),
                    percent(ratio),
                    percent(v.clone(answer, "fidelity") for v in runs),
                    spread((v.clone(answer, "queries") for v in runs), digits=0),
                ]
            )
    header = ["Victim", "Answer", "Clone acc", "Clone / victim", "Fidelity", "Queries"]
    return Table(header, rows, text_columns=2)


def deployment_table(result: Result) -> Table:
    """What quantization and export did to each victim."""
    header = "Victim|Validation acc|Fake-quant acc|int8 acc|Agreement|int8 layers|Float layers"
    rows = [
        [
            name,
            percent(v.validation_accuracy for v in runs),
            percent(v.accuracy_fake for v in runs),
            percent(v.accuracy_onnx for v in runs),
            percent(v.argmax_agreement for v in runs),
            _same(v.int8_layers for v in runs),
            _same(v.float_layers for v in runs),
        ]
        for name, runs in result.by_victim.items()
    ]
    return Table(header.split("|"), rows)


def confidence_table(result: Result) -> Table:
    """How sure each victim is on test images and on the attacker's."""
    header = "Victim|Top prob. test|Top prob. queries|Entropy test (nats)|Entropy queries (nats)"
    rows = []
    for name, runs in result.by_victim.items():
        on_test = [v.test for v in runs if v.test is not None]
        on_queries = [v.transfer for v in runs if v.transfer is not None]
        rows.append([name, *(_top(c) for c in (on_test, on_queries))])
        rows[-1] += [spread((c.entropy for c in cs), digits=2) for cs in (on_test, on_queries)]
    return Table(header.split("|"), rows)


def _top(confidences: list[Confidence]) -> str:
    return spread((c.top_probability for c in confidences), digits=3)


def _method(runs: list[VictimResult]) -> str:
    return _same(f"{v.method} {settings_text(v.settings)}".strip() for v in runs)


def settings_text(settings: dict[str, Any]) -> str:
    """``weight=0.15, temperature=4``."""
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in settings.items()
    )


def _same(values: Iterable[object]) -> str:
    """The values as text, each only once: all seeds normally agree."""
    return " / ".join(dict.fromkeys(str(v) for v in values if v is not None)) or ABSENT
