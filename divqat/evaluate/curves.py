"""Plots of trainings: curves, accuracy budget, quantization noise of each layer."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean
from typing import Any

from divqat._util.bounds import MAX_TABLE, check_file
from divqat._util.figures import COLORS, colors, save_plot
from divqat._util.files import check_beside

# Columns of metrics.csv and the labels of their axes.
CURVES = {
    "validation_accuracy": "validation accuracy (%)",
    "ce": "cross-entropy (nats)",
    "divergence": "divergence (nats)",
    "top_probability": "mean top probability",
    "misled": "proxies answered as misled (%)",
}
IN_PERCENT = ("validation_accuracy", "misled")
Values = list[tuple[float, float]]  # the points of one curve: (epoch, value)


def training_curves(files: dict[str, list[Path]], path: Path) -> Path | None:
    """Accuracy, cross-entropy, divergence and mean top probability over the epochs.

    Args:
        files: by victim name, the ``metrics.csv`` of every seed, with a column ``epoch`` and those
            of ``CURVES``; missing columns and values are skipped.
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
    """Validation accuracy and misled proxies on the line from the reference's weights to the
    defended ones.

    Args:
        budget: the entry ``budget`` of a ``summary.json``.
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


def layer_sqnr(layers: dict[str, list[tuple[str, float]]], path: Path) -> Path | None:
    """The signal to quantization noise ratio (SQNR) of every layer: (layer, dB) by victim.

    Arguments and errors are those of :func:`training_curves`."""
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
        raise ValueError(f"{path} is not a table of epochs: {error!r}") from error
    return curves
