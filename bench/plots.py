"""Plots of results. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from bench.case import COPY
from bench.curves import SWEEPS, curves
from divqat._util.errors import require
from divqat._util.figures import COLORS, STYLE, paint
from divqat._util.files import write_atomic

MARKERS = "osD^vP*X<>hd"


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    require("matplotlib", "report")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: str) -> Path:
    kind = Path(path).suffix.removeprefix(".")
    return write_atomic(path, lambda file: paint(figure, file, kind))


def _style(i: int, name: str) -> dict[str, Any]:
    if name == COPY:
        return {"color": "#909090"}
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The timed contenders, with the copy last."""
    names = dict.fromkeys(row["contender"] for row in rows if "milliseconds" in row)
    return sorted(names, key=lambda name: name == COPY)


def plot_rows(result: dict[str, Any], path: str) -> Path:
    """Effective bandwidth against the size of the input, a panel per op, dtype by line style."""
    rows = [row for row in result["rows"] if "milliseconds" in row]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(2, len(ops))
    figure, axes = _figure(math.ceil(len(ops) / columns), columns, (6.4, 4.0))
    names = _names(rows)
    for axis in axes.flat[len(ops) :]:
        axis.set_visible(False)
    for axis, op in zip(axes.flat, ops, strict=False):
        for i, name in enumerate(names):
            for dtype, dashes in (("float32", "-"), ("bfloat16", "--")):
                points: dict[float, list[float]] = {}
                for row in rows:
                    if (row["op"], row["contender"], row["dtype"]) == (op, name, dtype):
                        points.setdefault(row["bytes"] / 2**20, []).append(row["gb_per_s"])
                if points:
                    label = name if dtype == "float32" else None
                    xs = sorted(points)
                    ys = [median(points[x]) for x in xs]
                    axis.plot(xs, ys, dashes, label=label, linewidth=1, **_style(i, name))
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", title=op)
        axis.set_xlabel("memory traffic (MB)")
        axis.set_ylabel("bandwidth (GB/s)")
    handles = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8,
        title="solid: float32, dashed: bfloat16",
    )  # fmt: skip
    figure.suptitle(f"Forward + backward, {result['hardware']}, {result['date']}", fontsize=10)
    return _save(figure, path)


def plot_steps(result: dict[str, Any], path: str) -> Path:
    """Time of a training step relative to the float step, with a panel per network and batch."""
    rows = [row for row in result["rows"] if "milliseconds" in row]
    cases = list(dict.fromkeys((r["network"], r["batch"], r["dtype"]) for r in rows))
    figure, axes = _figure(1, len(cases), (5.2, 5.0))
    for axis, case in zip(axes.flat, cases, strict=True):
        bars = [r for r in rows if (r["network"], r["batch"], r["dtype"]) == case]
        bars.reverse()  # the first on top
        colors = [COLORS[0] if r["contender"].startswith("divqat") else "#909090" for r in bars]
        labels = [f"{r['contender']}, {r['mode']}" for r in bars]
        axis.barh(labels, [r["over_float"] for r in bars], color=colors)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(f"{case[0]}, batch {case[1]}, {case[2]}")
        axis.set_xlabel("time of a step relative to eager float training")
    figure.suptitle(f"{result['hardware']}, {result['date']}", fontsize=10)
    return _save(figure, path)


def plot_scaling(result: dict[str, Any], path: str) -> Path:
    """Time (top row) and memory (bottom row) against each size."""
    rows = result["rows"]
    sweeps = [sweep for sweep in SWEEPS if curves(rows, sweep)]
    names = _names(rows)
    figure, axes = _figure(2, len(sweeps), (4.4, 3.4))
    for column, sweep in enumerate(sweeps):
        for axis, value, label in (
            (axes[0, column], "milliseconds", "time (ms)"),
            (axes[1, column], "extra_bytes", "extra memory (MB)"),
        ):
            for name, (x, y) in curves(rows, sweep, value).items():
                scale = 2**20 if value == "extra_bytes" else 1
                drawn = [v / scale if v > 0 else math.nan for v in y]
                style = _style(names.index(name), name)
                axis.plot(x, drawn, label=name, linewidth=1, **style)
            axis.set_xscale("log", base=2)
            axis.set(yscale="log", ylabel=label)
        axes[0, column].legend(fontsize=7)
        axes[1, column].set_xlabel(SWEEPS[sweep][0], fontsize=8)
        axes[0, column].set_title(sweep)
    figure.suptitle(f"{result['hardware']}, {result['date']}", fontsize=10)
    return _save(figure, path)
