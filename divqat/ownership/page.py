"""The verdict as a file and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from divqat._util.figures import COLORS, save_plot
from divqat._util.files import write_json
from divqat._util.version import __version__
from divqat.evaluate.page import Section, write_page
from divqat.evaluate.table import Table
from divqat.ownership.check import Verdict

BINS = 60


def write_verdict(verdict: Verdict, folder: str | Path, *, suspect: str, secret: str) -> Path:
    """Write ``ownership.json``, a histogram and a page; returns the path of ``report.html``.

    The key is in none of them.

    Args:
        verdict: of :func:`divqat.ownership.check`.
        folder: for the files.
        suspect, secret: names of the suspect and of the run.

    Raises:
        ImportError: matplotlib or Pillow is missing.
    """
    folder = Path(folder)
    plot = save_plot(folder / "null.png", (7, 3.2), lambda figure: _draw(figure, verdict))
    write_json(folder / "ownership.json", as_dict(verdict, suspect=suspect, secret=secret))
    rows = [
        [str(look.queries), f"{look.agreement:.1%}", f"{look.excess:+.1%}", f"{look.p:.2g}"]
        for look in verdict.looks
    ]
    table = Table(["queries", "agreement", "above unrelated answers", "p of this look"], rows, 0)
    title = "Was this model copied?"
    sections = [
        Section("Verdict", sentence(verdict, suspect=suspect, secret=secret)),
        Section("Looks", "The test stops at the first look with p of at most alpha / 4.", table),
        Section("The suspect among other keys", _about(verdict), plot=plot),
        Section("What this means", _meaning(verdict)),
    ]
    return write_page(folder, title, sections)


def sentence(verdict: Verdict, *, suspect: str, secret: str) -> str:
    """The verdict in words."""
    said = "carries the decoy of" if verdict.copied else "shows no sign of the decoy of"
    return (
        f"{suspect} {said} {secret}: p = {verdict.p:.2g}, at a false-alarm rate of "
        f"{verdict.alpha:g}, after {verdict.queries} queries (answers: {verdict.answer})."
    )


def as_dict(verdict: Verdict, *, suspect: str, secret: str) -> dict[str, Any]:
    """The content of ``ownership.json``."""
    quantiles = torch.tensor([0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    return {
        "suspect": suspect,
        "secret": secret,
        "copied": verdict.copied,
        "p": verdict.p,
        "alpha": verdict.alpha,
        "agreement": verdict.agreement,
        "queries": verdict.queries,
        "answer": verdict.answer,
        "nonce": verdict.nonce,
        "keyed": verdict.keyed,
        "looks": [look._asdict() for look in verdict.looks],
        "other_keys": len(verdict.null),
        "null_quantiles": dict(
            zip(
                map(str, quantiles.tolist()), verdict.null.quantile(quantiles).tolist(), strict=True
            )
        ),
        "divqat": __version__,
    }


def _about(verdict: Verdict) -> str:
    return (
        f"Agreement above unrelated answers, with the decoys of {len(verdict.null):,} other keys "
        f"(bars), and with that of the run (line); nonce {verdict.nonce}."
    )


def _meaning(verdict: Verdict) -> str:
    text = (
        "p bounds how often an independent model would agree this much, over keys. It says nothing "
        "about who copied whom: that follows from a timestamp of the key's commitment."
    )
    if verdict.keyed:
        return text
    return (
        f"{text} The decoy of this run has no key: it depends on the seed of the training, which "
        "could have been chosen afterwards. This convinces its owner, and nobody else."
    )


def _draw(figure: Any, verdict: Verdict) -> None:
    axes = figure.subplots()
    axes.hist(verdict.null.tolist(), bins=BINS, color=COLORS[0], label="other keys")
    axes.axvline(verdict.looks[-1].excess, color=COLORS[1], linewidth=2, label="key of the run")
    axes.set_xlabel("agreement above unrelated answers")
    axes.set_ylabel("keys")
    axes.legend()
