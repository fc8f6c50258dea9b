"""How the pictures of ``python -m bench pictures`` are drawn, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divqat._util.errors import require
from divqat._util.figures import save_plot

WIDTH = 5.4  # inches: text stays legible on a telephone
Draw = Callable[[Any, "Theme"], None]


@dataclass(frozen=True)
class Theme:
    """Colors of one of the two versions of a picture."""

    name: str
    page: str
    text: str
    grid: str
    plain: str
    defended: str
    other: str

    def settings(self) -> dict[str, Any]:
        """For matplotlib's ``rc_context``."""
        keys = ["text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor"]
        return dict.fromkeys([*keys, "xtick.color", "ytick.color"], self.text) | dict.fromkeys(
            ["figure.facecolor", "axes.facecolor", "savefig.facecolor"], self.page
        )


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#e6e6e6", "#0072B2", "#D55E00", "#009E73"),
    Theme("dark", "#0d1117", "#e6edf3", "#30363d", "#58a6ff", "#ff9e64", "#3fb98f"),
)


@dataclass(frozen=True)
class Line:
    """Mean accuracies of best clones, in percent, by the number of queries."""

    label: str
    defended: bool
    queries: Sequence[int]
    means: Sequence[float]
    deviations: Sequence[float]


@dataclass(frozen=True)
class Shown:
    """A foreign picture, and answers to it: probabilities of the classes."""

    picture: Any  # uint8 [H, W, 3]
    seen: Any  # uint8 [h, w], what the networks get
    plain: Sequence[float]
    defended: Sequence[float]
    coarse: Any  # float [8, 8], what the decoy makes of it
    components: Sequence[float]
    decoy: Sequence[float]


def save_both(folder: Path, name: str, height: float, draw: Draw) -> list[Path]:
    """Write ``name-light.png`` and ``name-dark.png``."""
    matplotlib = require("matplotlib", "report")
    paths = []
    for theme in THEMES:
        with matplotlib.rc_context(theme.settings()):
            path = folder / f"{name}-{theme.name}.png"
            paths.append(save_plot(path, (WIDTH, height), lambda f, t=theme: draw(f, t)))
    return paths


def queries(figure: Any, theme: Theme, lines: Sequence[Line], read: Line, chance: float) -> None:
    """Best clones against queries; ``read``: of a thief who has read the source."""
    ax = figure.subplots()
    for line in [*lines, read]:
        color = theme.defended if line.defended else theme.plain
        small = len(line.queries) > 1
        style = {"marker": "o" if small else "D" if line is not read else "s", "ms": 6}
        if line is read:
            style |= {"mfc": theme.page, "mew": 1.8}
        ax.errorbar(
            line.queries, line.means, yerr=line.deviations, color=color, capsize=2, lw=1.8,
            elinewidth=1, ls="-" if small else "", label=line.label, **style,
        )  # fmt: skip
    ax.axhline(chance, ls=":", lw=1, color=theme.text)
    ax.text(30_000, chance + 1.5, "chance", fontsize=8, ha="right")
    ticks = [1000, 3000, 10_000, 27_540]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.minorticks_off()
    ax.set(xlabel="queries with foreign images", ylabel="accuracy of the best clone (%)")
    ax.set(ylim=(0, 100), xlim=(850, 34_000))
    ax.grid(color=theme.grid)
    figure.legend(loc="outside lower center", fontsize=8, ncols=1)


def answers(figure: Any, theme: Theme, shown: Sequence[Shown]) -> None:
    """Foreign pictures, and what a plain and a defended victim answer."""
    columns = 3
    cells = figure.subfigures(-(-len(shown) // columns), columns)
    for cell, item in zip(cells.flat, shown, strict=True):
        top, bottom = cell.subfigures(2, 1, height_ratios=[1.1, 1])
        for ax, pixels in zip(top.subplots(1, 2), (item.picture, item.seen), strict=True):
            _picture(ax, pixels)
        ax = bottom.subplots()
        _bars(ax, theme, [("plain", theme.plain, item.plain), ("", theme.defended, item.defended)])
        for place, color, values in (
            (0, theme.plain, item.plain),
            (1, theme.defended, item.defended),
        ):
            best = max(range(len(values)), key=values.__getitem__)
            ax.set_title(
                f"{best} ({100 * values[best]:.0f} %)", fontsize=8, color=color,
                loc=("left", "right")[place],
            )  # fmt: skip
    _legend(figure, theme, ["answer of the plain victim", "of the defended one"])


def decoys(figure: Any, theme: Theme, shown: Sequence[Shown]) -> None:
    """How the decoy sees pictures: a row for each."""
    grid = figure.subplots(len(shown), 4, width_ratios=[0.9, 0.9, 1, 2])
    titles = ["picture", "8×8 values", "components", "answer"]
    for row, item in enumerate(shown):
        _picture(grid[row, 0], item.picture)
        extent = abs(item.coarse).max()
        grid[row, 1].imshow(item.coarse, cmap="RdBu_r", vmin=-extent, vmax=extent)
        _bare(grid[row, 1])
        ax = grid[row, 2]
        ax.barh(range(4), item.components, color=theme.other, height=0.6)
        ax.axvline(0, color=theme.text, lw=0.8)
        ax.set(xlim=(-3.5, 3.5), xticks=[], yticks=[])
        ax.grid(visible=False)
        for side in ax.spines.values():
            side.set_visible(False)
        _bars(
            grid[row, 3],
            theme,
            [("", theme.other, item.decoy), ("", theme.defended, item.defended)],
        )
        if not row:
            for ax, title in zip(grid[0], titles, strict=True):
                ax.set_title(title, fontsize=9)
    _legend(figure, theme, ["the decoy", "answer of the defended victim"], first=theme.other)


def loss(figure: Any, theme: Theme) -> None:
    """The training: two kinds of images, one network, two cross-entropies."""
    ax = figure.subplots()
    ax.set(xlim=(0, 100), ylim=(0, 62))
    ax.axis("off")
    boxes = {
        "images": (13, 48, "training images\nwith labels", theme.plain),
        "proxies": (13, 22, "proxies of a\nthief's queries", theme.defended),
        "net": (45, 35, "int8 network\n(one pass)", theme.text),
        "label": (80, 48, "cross-entropy\nwith the label", theme.plain),
        "foreign": (80, 22, "cross-entropy with\nthe decoy's answer", theme.defended),
        "decoy": (45, 7, "decoy: brightness\nand a secret seed", theme.other),
    }
    for x, y, text, color in boxes.values():
        box = {"boxstyle": "round,pad=0.5", "fc": theme.page, "ec": color, "lw": 1.6}
        ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box)
    arrows = [
        ((25, 46), (34, 38), theme.plain), ((25, 24), (34, 32), theme.defended),
        ((56, 38), (68, 46), theme.plain), ((56, 32), (66, 24), theme.defended),
        ((25, 18), (33, 9), theme.other), ((58, 9), (72, 17), theme.other),
    ]  # fmt: skip
    for start, end, color in arrows:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6})
    ax.annotate("", (13, 28), (13, 42), arrowprops={"arrowstyle": "-|>", "color": theme.text})
    ax.text(15, 35, "rotate, warp,\nshuffle …", fontsize=8, va="center")
    ax.text(80, 35, "+ 0.8 ×", ha="center", va="center", fontsize=11)


def _bars(ax: Any, theme: Theme, groups: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """Probabilities of the ten classes, of each group beside each other."""
    width = 0.8 / len(groups)
    for i, (_, color, values) in enumerate(groups):
        places = [n + width * (i - (len(groups) - 1) / 2) for n in range(len(values))]
        ax.bar(places, values, width, color=color)
    ax.set(ylim=(0, 1), yticks=[0, 1], xticks=range(len(groups[0][2])))
    ax.set_yticklabels([])
    ax.tick_params(length=0, labelsize=7)
    ax.grid(color=theme.grid, axis="y")


def _picture(ax: Any, pixels: Any) -> None:
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    _bare(ax)


def _bare(ax: Any) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(False)


def _legend(figure: Any, theme: Theme, labels: Sequence[str], first: str | None = None) -> None:
    patch = require("matplotlib.patches", "report").Patch
    colors = [first or theme.plain, theme.defended]
    handles = [patch(color=c, label=label) for c, label in zip(colors, labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5)
