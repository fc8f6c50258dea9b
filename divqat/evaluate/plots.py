"""Plots of an evaluation; :func:`divqat._util.figures.save_plot` lists the errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from divqat._util.figures import BARS, COLORS, colors, save_plot
from divqat.evaluate.results import HARD, SOFT, Cell, Evaluation, best_of, reads
from divqat.evaluate.specs import UNDEFENDED, is_control
from divqat.evaluate.tables import floor
from divqat.metrics import HISTOGRAM_BINS

MARKERS, DASHES = "osD^vPX*<>ph8d", ("-", "--", ":", "-.")
MARKED = 15  # points of a line that is drawn with markers
LINE = {"color": "#808080", "lw": 1}
WHISKER = {"ecolor": "#909090", "capsize": 2, "lw": 1}


def front(result: Evaluation, path: Path) -> Path | None:
    """The trade-off: accuracy of the released answers against accuracy of the best clone."""
    points = {}
    for victim, defense in result.pairs():
        rows = result.select(result.released, victim=victim, defense=defense)
        clones = [100 * cell.accuracy for cell in result.per_seed(victim, defense, best_of)]
        answers = [100 * row.released_accuracy for row in rows if row.released_accuracy is not None]
        if answers and clones:
            points[victim, defense] = (clones, answers)
    if not points:
        return None
    defenses = list(dict.fromkeys(defense for _, defense in points))
    victims = dict(zip(dict.fromkeys(victim for victim, _ in points), colors(), strict=False))

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        markers = {defense: _marker(i) for i, defense in enumerate(defenses)}
        for (victim, defense), (clones, answers) in points.items():
            ax.errorbar(
                mean(clones), mean(answers), _std(answers), _std(clones), ls="",
                color=victims[victim],
                ecolor="#b0b0b0", elinewidth=1, **markers[defense],
            )  # fmt: skip
        for victim, color in victims.items():
            ax.plot([], [], "s", color=color, label=victim)
        for defense, marker in markers.items():
            ax.plot([], [], ls="", color="#606060", label=defense, **marker)
        ax.axvline(100 * result.chance, ls=":", **LINE)
        lowest = floor(result)
        if lowest is not None:
            ax.axvline(100 * lowest, ls="--", **LINE)
        ax.set(xlabel="best clone's test accuracy (%), less is better")
        ax.set(ylabel="accuracy of released answers (%)")
        figure.legend(loc="outside right upper", fontsize=8)

    entries = len(victims) + len(defenses)
    return save_plot(path, (8.0, max(4.6, 0.19 * entries + 0.3)), draw)


def _marker(number: int) -> dict[str, Any]:
    """The marker of a defense; when all are used, the same ones come again hollow."""
    hollow = number >= len(MARKERS)
    marker = {"marker": MARKERS[number % len(MARKERS)], "ms": 7}
    return {**marker, "mfc": "none"} if hollow else marker


def bars(result: Evaluation, path: Path) -> Path | None:
    """Clones from soft answers, from hard answers, and the best of all, of every victim and
    defense."""
    pairs = [pair for pair in result.pairs() if result.per_seed(*pair, best_of)]
    if not pairs:
        return None
    picks = {"soft answers": reads(SOFT), "hard answers": reads(HARD), "best of all": best_of}
    groups = {
        label: [[c.accuracy for c in result.per_seed(*pair, pick)] for pair in pairs]
        for label, pick in picks.items()
    }
    return _bars(result, [" · ".join(pair) for pair in pairs], groups, BARS, path)


def attacks(result: Evaluation, path: Path) -> Path | None:
    """Clone accuracy of every attack on every undefended victim, at the largest query budget; None
    if only one attack was tried."""
    cells = result.select(result.cells, defense=UNDEFENDED, budget=result.budget)
    names = list(dict.fromkeys((cell.attack, cell.clone) for cell in cells))
    if len(names) < 2:
        return None
    groups = {
        victim: [
            [c.accuracy for c in result.select(cells, victim=victim, attack=attack, clone=clone)]
            for attack, clone in names
        ]
        for victim in dict.fromkeys(cell.victim for cell in cells)
    }
    several = len({clone for _, clone in names}) > 1
    labels = [f"{attack} ({clone})" if several else attack for attack, clone in names]
    return _bars(result, labels, groups, colors(), path)


def _bars(
    result: Evaluation,
    rows: list[str],  # labels of the y axis
    groups: dict[str, list[list[float]]],  # by legend entry, for each row the seeds' accuracies
    palette: Iterable[str],
    path: Path,
) -> Path:
    """Horizontal bars; those of a row stand beside each other."""
    width = 0.75 / len(groups)

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        for i, (color, (label, values)) in enumerate(zip(palette, groups.items(), strict=False)):
            known = [(row, [100 * x for x in seeds]) for row, seeds in enumerate(values) if seeds]
            ax.barh(
                [row + width * (i - (len(groups) - 1) / 2) for row, _ in known],
                [mean(seeds) for _, seeds in known],
                0.92 * width,
                xerr=[_std(seeds) for _, seeds in known],
                error_kw=WHISKER,
                color=color,
                label=label,
            )
        ax.axvline(100 * result.chance, ls=":", label="chance", **LINE)
        lowest = floor(result)
        if lowest is not None:
            ax.axvline(100 * lowest, ls="--", label="label-only floor", **LINE)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        ax.set(xlabel="clone's test accuracy (%)", xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=5)

    return save_plot(path, (8.0, max(0.42, 0.14 * len(groups)) * len(rows) + 1.2), draw)


def budget_curve(result: Evaluation, path: Path) -> Path | None:
    """Clone accuracy against queries, on undefended victims; None if there is only one budget."""
    cells = [c for c in result.cells if c.defense == UNDEFENDED and not is_control(c.attack)]
    if len({cell.budget for cell in cells}) < 2:
        return None
    points = _Points("queries", "log", lambda cell: [(cell.budget, cell.accuracy)])
    return _lines(result, cells, points, path)


def epoch_curve(result: Evaluation, path: Path) -> Path | None:
    """Clone accuracy after every epoch or round, on undefended victims and at the largest query
    budget; None if no clone was trained for longer than two."""
    cells = result.select(result.cells, defense=UNDEFENDED, budget=result.budget)
    cells = [cell for cell in cells if len(cell.curve) > 2]
    points = _Points("epoch or round", "linear", lambda cell: list(enumerate(cell.curve, 1)))
    return _lines(result, cells, points, path) if cells else None


@dataclass(frozen=True)
class _Points:
    """What a plot of lines has along its x axis, and the points of one attack's line."""

    label: str
    scale: str
    of: Callable[[Cell], list[tuple[int, float]]]  # x and accuracy


def _lines(result: Evaluation, cells: list[Cell], points: _Points, path: Path) -> Path:
    """A panel for each victim with a line for each attack and clone."""
    victims = list(dict.fromkeys(cell.victim for cell in cells))
    attacks = {(cell.attack, cell.clone): f"{cell.attack} ({cell.clone})" for cell in cells}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(victims), sharey=True, squeeze=False)[0]
        entries = {}
        for ax, victim in zip(axes, victims, strict=True):
            # Another dash pattern when the colors repeat.
            styles = ({"color": color, "ls": ls} for ls in DASHES for color in COLORS)
            for style, (attack, clone) in zip(itertools.cycle(styles), attacks, strict=False):
                found: dict[int, list[float]] = {}
                for cell in result.select(cells, victim=victim, attack=attack, clone=clone):
                    for x, accuracy in points.of(cell):
                        found.setdefault(x, []).append(100 * accuracy)
                if found:
                    line = [(x, mean(found[x]), _std(found[x])) for x in sorted(found)]
                    mark = "o" if len(line) <= MARKED else None
                    entries[attacks[attack, clone]] = ax.errorbar(
                        *zip(*line, strict=True), **style, marker=mark, ms=4, capsize=2
                    )
            ax.set(title=victim, xlabel=points.label, xscale=points.scale)
            ax.axhline(100 * result.chance, ls=":", **LINE)
        axes[0].set_ylabel("clone's test accuracy (%)")
        figure.legend(
            [*entries.values()], [*entries], loc="outside upper center", ncols=columns, fontsize=8
        )

    # A legend wider than the figure would be cut off.
    entry = 0.5 + 0.07 * max(map(len, attacks.values()))  # inches
    width = max(5.0, 3.4 * len(victims), entry)
    columns = int(width // entry)
    return save_plot(path, (width, 3.3 + 0.18 * math.ceil(len(attacks) / columns)), draw)


def answers(result: Evaluation, path: Path) -> Path | None:
    """Histogram of the undefended victims' top probability, on test images and on queries."""
    rows = [row for row in result.select(result.released, defense=UNDEFENDED) if row.test]
    if not rows:
        return None
    victims = list(dict.fromkeys(row.victim for row in rows))

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        edges = [i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1)]
        for ax, name in zip(axes, ("test", "queries"), strict=True):
            for color, victim in zip(colors(), victims, strict=False):
                histograms = [getattr(row, name).histogram for row in rows if row.victim == victim]
                counts = [sum(column) for column in zip(*histograms, strict=True)]
                shares = [100 * count / sum(counts) for count in counts]
                ax.stairs(shares, edges, color=color, lw=1.6, label=victim)
            ax.set(title=name, xlabel="victim's top probability", xlim=(0, 1))
        axes[0].set_ylabel("share of images (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)

    return save_plot(path, (8.4, 3.2), draw)


def _std(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
