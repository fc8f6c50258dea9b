"""The plots of a report. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from divqat.bounds import MAX_TABLE, check_file
from divqat.errors import require
from divqat.evaluate.metrics import HISTOGRAM_BINS
from divqat.evaluate.result import HARD, SOFT, Result, VictimResult
from divqat.files import check_beside, write_atomic

# Okabe and Ito: told apart by color-blind readers too.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MORE = ["#999999", "#8C564B", "#9467BD", "#A6D854", "#7F0000"]  # of which fewer can be told apart
BARS = ["#404040", *COLORS[:3]]
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "font.size": 9.5,
    "figure.dpi": 150,
    "text.parse_math": False,  # a $ in a name is a dollar
    "text.usetex": False,  # whatever a matplotlibrc in this folder says
}
# Columns of metrics.csv and the label of their axis.
CURVES = {
    "validation_accuracy": "validation accuracy (%)",
    "ce": "cross-entropy (nats)",
    "divergence": "divergence (nats)",
    "top_probability": "mean top probability",
    "misled": "proxies answered as misled (%)",
}
IN_PERCENT = ("validation_accuracy", "misled")
Values = list[tuple[float, float]]  # of one curve: (epoch, value)


def training_curves(files: dict[str, list[Path]], path: Path) -> Path | None:
    """Accuracy, cross-entropy, divergence and mean top probability over the epochs.

    Args:
        files: the ``metrics.csv`` of every seed by victim name, with a column ``epoch`` and those
            of ``CURVES``; columns and values that are missing are left out.
        path: the PNG to write.

    Returns:
        ``path``, or None when there is nothing to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    curves = {name: [_read_curves(file) for file in paths] for name, paths in files.items()}
    panels = [
        column for column in CURVES if any(c.get(column) for cs in curves.values() for c in cs)
    ]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, column in zip(axes, panels, strict=False):
            for color, (name, seeds) in zip(colors(), curves.items(), strict=False):
                _curve(ax, [seed[column] for seed in seeds if seed.get(column)], color, name)
            ax.set(title=CURVES[column], xlabel="epoch")
        handles, labels = axes[0].get_legend_handles_labels()
        for ax in axes[1 : len(panels)]:  # a victim may be missing in the first panel
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles, labels = [*handles, handle], [*labels, label]
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))

    return save_plot(path, (4.2 * columns, 2.7 * rows + 0.3), draw)


def budget_path(budget: dict[str, Any], path: Path) -> Path:
    """What the way back to undefended weights costs and keeps.

    Args:
        budget: of a ``summary.json``.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = sorted(budget["path"], key=lambda row: row["share"])
    panels = [column for column in IN_PERCENT if column in rows[0]]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        shares = [100 * row["share"] for row in rows]
        for ax, column in zip(axes, panels, strict=True):
            ax.plot(shares, [100 * row[column] for row in rows], "o-", color=COLORS[0], ms=4)
            ax.axvline(100 * budget["share"], color="#808080", ls=":", lw=1, label="chosen")
            ax.set(title=CURVES[column], xlabel="way from plain QAT to the defense (%)")
        limit = 100 * budget["reference"] - budget["points"]
        axes[0].axhline(limit, color=COLORS[1], ls="--", lw=1, label="budget")
        axes[0].legend()

    return save_plot(path, (4.2 * len(panels), 3.0), draw)


def clone_bars(result: Result, path: Path) -> Path:
    """Victim accuracy beside the accuracy of its soft, hard and best clone; see
    :func:`training_curves` for the arguments and errors."""
    groups: dict[str, Callable[[VictimResult], float | None]] = {
        "victim": lambda v: v.accuracy,
        "clone, soft answers": lambda v: v.clone(SOFT),
        "clone, hard answers": lambda v: v.clone(HARD),
        "best clone": lambda v: v.best,
    }
    victims = result.by_victim

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        shown = []  # in the order of the legend
        whisker = {"ecolor": "#909090", "capsize": 2, "lw": 1}
        line = {"color": "#808080", "lw": 1}
        for i, (c, (label, of)) in enumerate(zip(BARS, groups.items(), strict=True)):
            values = [
                [100 * x for x in map(of, runs) if x is not None] for runs in victims.values()
            ]
            at = [(n + 0.2 * (i - 1.5), known) for n, known in enumerate(values) if known]
            heights = [mean(known) for _, known in at]
            errors = [stdev(known) if len(known) > 1 else 0 for _, known in at]
            places = [place for place, _ in at]
            bars = ax.bar(
                places, heights, 0.18, yerr=errors, error_kw=whisker, color=c, label=label
            )
            shown.append(bars)
            ax.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        if result.floor:
            floor = 100 * mean(result.floor)
            shown.append(ax.axhline(floor, label="label-only floor", ls="--", **line))
        shown.append(ax.axhline(100 * result.chance, label="chance", ls=":", **line))
        ax.set_xticks(range(len(victims)), victims)
        ax.grid(axis="x", visible=False)
        ax.set(ylabel="test accuracy (%)", ylim=(0, 105), xlim=(-0.6, len(victims) - 0.4))
        figure.legend(handles=shown, loc="outside upper center", ncols=3)

    return save_plot(path, (max(6.0, 1.8 * len(victims) + 1), 4.0), draw)


def confidence_histograms(result: Result, path: Path) -> Path | None:
    """The top probability of the victims on test images and on the attacker's; see
    :func:`training_curves` for the arguments and errors."""
    sets = {"test": f"test images ({result.dataset})", "transfer": f"queries ({result.query_set})"}
    if not any(v.test or v.transfer for v in result.victims):
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        edges = [i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1)]
        for ax, (field, title) in zip(axes, sets.items(), strict=True):
            for color, (name, runs) in zip(colors(), result.by_victim.items(), strict=False):
                found = [c.histogram for v in runs if (c := getattr(v, field)) is not None]
                counts = [sum(column) for column in zip(*found, strict=True)]
                if sum(counts):
                    shares = [100 * count / sum(counts) for count in counts]
                    ax.stairs(shares, edges, color=color, lw=1.6, label=name)
            ax.set(title=title, xlabel="victim's top probability", xlim=(0, 1))
        axes[0].set_ylabel("share of images (%)")
        drawn = max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[1]))
        figure.legend(*drawn.get_legend_handles_labels(), loc="outside upper center", ncols=4)

    return save_plot(path, (8.4, 3.2), draw)


def layer_sqnr(layers: dict[str, list[tuple[str, float]]], path: Path) -> Path | None:
    """Signal to quantization noise of every layer: (layer, dB) by victim; see
    :func:`training_curves` for the arguments and errors."""
    names = list(dict.fromkeys(name for rows in layers.values() for name, _ in rows))
    if not names:
        return None

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        for color, (victim, rows) in zip(colors(), layers.items(), strict=False):
            if rows:
                places = [names.index(name) for name, _ in rows]
                ax.plot([value for _, value in rows], places, "o", color=color, ms=5, label=victim)
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="SQNR (dB, more is better)", ylim=(len(names) - 0.5, -0.5))
        figure.legend(loc="outside upper center", ncols=4)

    return save_plot(path, (7.0, 0.24 * len(names) + 1.3), draw)


def _curve(ax: Any, seeds: list[Values], color: str, label: str) -> None:
    by_epoch: dict[float, list[float]] = {}
    for values in seeds:
        for epoch, value in values:
            by_epoch.setdefault(epoch, []).append(value)
    epochs = sorted(by_epoch)
    if not epochs:
        return
    marker = "o" if len(epochs) < 3 else None
    means = [mean(by_epoch[epoch]) for epoch in epochs]
    ax.plot(epochs, means, color=color, lw=1.6, marker=marker, label=label)
    if len(seeds) > 1:
        low, high = ([f(by_epoch[epoch]) for epoch in epochs] for f in (min, max))
        ax.fill_between(epochs, low, high, color=color, alpha=0.15, lw=0)


def _read_curves(path: Path) -> dict[str, Values]:
    check_file(path, MAX_TABLE)
    curves: dict[str, Values] = {}
    remedy = "delete summary.json and give the command of the training again"
    check_beside(path, "summary.json", remedy)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for column in CURVES:
                    text = row.get(column)
                    value = float(text) if text else math.nan
                    if math.isfinite(value):
                        scale = 100 if column in IN_PERCENT else 1
                        curves.setdefault(column, []).append((float(row["epoch"]), scale * value))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of epochs: {error!r}") from error
    return curves


def colors() -> Iterable[str]:
    """Colors without end, of which the first twelve differ."""
    while True:
        yield from COLORS
        yield from MORE


def save_plot(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> Path:
    """Let ``draw`` fill a matplotlib Figure of ``size`` inches, and write it atomically.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib = require("matplotlib", "report")
    # Not pyplot: it keeps every figure and wants to choose a window system.
    figure_class = require("matplotlib.figure", "report").Figure
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=size, layout="constrained")
        draw(figure)
        kind = path.suffix.removeprefix(".")
        return write_atomic(path, lambda file: paint(figure, file, kind))


def paint(figure: Any, file: Path, kind: str) -> None:
    """Write a matplotlib Figure; a PNG has 128 colors, with which it takes a third of the room."""
    if kind != "png":
        figure.savefig(file, format=kind)
        return
    data = io.BytesIO()
    figure.savefig(data, format=kind)
    image = require("PIL.Image", "report").open(data)
    image.convert("RGB").quantize(128, kmeans=1).save(file, kind, optimize=True)
