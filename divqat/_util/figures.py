"""Style and output of plots. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from divqat._util.errors import require
from divqat._util.files import write_atomic

# The palette of Okabe and Ito, which color-blind readers can distinguish, too.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MORE = ["#999999", "#8C564B", "#9467BD", "#A6D854", "#7F0000"]  # harder to distinguish
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
    "text.parse_math": False,  # a $ in a name is a dollar sign
    "text.usetex": False,  # overrides a matplotlibrc in this folder
}


def colors() -> Iterable[str]:
    """An endless cycle of twelve colors."""
    while True:
        yield from COLORS
        yield from MORE


def save_plot(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> Path:
    """Let ``draw`` fill a matplotlib Figure of ``size`` inches, and write it atomically.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib = require("matplotlib", "report")
    # Not pyplot, which keeps every figure and chooses a window system.
    figure_class = require("matplotlib.figure", "report").Figure
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=size, layout="constrained")
        draw(figure)
        kind = path.suffix.removeprefix(".")
        return write_atomic(path, lambda file: paint(figure, file, kind))


def paint(figure: Any, file: Path, kind: str) -> None:
    """Write a matplotlib Figure; a PNG with 128 colors, which takes a third of the space."""
    if kind != "png":
        figure.savefig(file, format=kind)
        return
    data = io.BytesIO()
    figure.savefig(data, format=kind)
    image = require("PIL.Image", "report").open(data)
    image.convert("RGB").quantize(128, kmeans=1).save(file, kind, optimize=True)
