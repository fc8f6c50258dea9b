"""A page of text, tables, plots and audits, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path

from divqat._util.files import write_text
from divqat._util.text import markdown, printable
from divqat.evaluate.audits import Audit
from divqat.evaluate.table import Table

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2rem 0 .4rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem; margin: .6rem 0 }
th, td { padding: .32rem .65rem; border-bottom: 1px solid #e2e2e2; text-align: left;
  vertical-align: top }
thead th { border-bottom: 2px solid #999 } tbody tr:hover { background: #f6f8fa }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
img { max-width: 100%; display: block; margin: .6rem 0 } ul { padding-left: 0 }
li { list-style: none } li b { display: inline-block; width: 1.5rem; color: #1a7f37 }
.check { font-weight: 600 } .check b { color: #b35900 }
"""


@dataclass(frozen=True)
class Section:
    """A heading with text, a table, a plot or audits below it."""

    title: str
    text: str = ""
    table: Table | None = None
    plot: Path | None = None
    audits: tuple[Audit, ...] = ()


def escape(text: str) -> str:
    """Text for HTML: any of it may come from other people."""
    return escape_html(printable(text))


def write_page(folder: Path, title: str, sections: list[Section]) -> Path:
    """Write ``folder/report.md``, which links the plots, and ``folder/report.html``, which is
    self-contained; returns the path of the latter."""
    write_text(folder / "report.md", _markdown(title, sections, folder))
    return write_text(folder / "report.html", _html(title, sections))


def _markdown(title: str, sections: list[Section], run_dir: Path) -> str:
    parts = [f"# {markdown(title)}"]
    for section in sections:
        plot = section.plot.relative_to(run_dir).as_posix() if section.plot else ""
        parts += [
            f"## {markdown(section.title)}",
            markdown(section.text),
            section.table.markdown() if section.table else "",
            f"![{markdown(section.title)}]({plot})" if plot else "",
            "\n".join(f"- {markdown(str(audit))}" for audit in section.audits),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _html(title: str, sections: list[Section]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>")
        if section.table:
            parts.append(f'<div class="wide">{section.table.html()}</div>')
        if section.plot:
            data = base64.b64encode(section.plot.read_bytes()).decode()
            parts.append(f'<img alt="{escape(section.title)}" src="data:image/png;base64,{data}">')
        if section.audits:
            parts.append(f"<ul>{''.join(map(_html_audit, section.audits))}</ul>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_audit(audit: Audit) -> str:
    kind, mark = ("ok", "✓") if audit.ok else ("check", "✗")
    return f'<li class="{kind}"><b>{mark}</b>{escape(audit.name)}: {escape(audit.detail)}</li>'
