"""A plot of what the quantization of each layer costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from divqat._util.figures import BARS, save_plot
from divqat._util.text import printable

WIDTH = 0.38  # of a bar; two stand beside each other


def sensitivity_bars(result: dict[str, Any], path: Path) -> Path:
    """Two bars for each layer: quantized alone, and with all others quantized instead.

    From left to right: the increase of the loss over the float model, with labels only; the
    divergence from its answers, which has less noise; the share of images that get another answer.
    A line shows the model with everything quantized.

    Args:
        result: :meth:`divqat.quantize.Sensitivity.to_dict`.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    layers, floating = result["layers"], result["floating"]
    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "increase of the loss (nats)": lambda score: score["loss"] - floating["loss"],
        "divergence (nats)": lambda score: score["divergence"],
        "other answers (%)": lambda score: 100 * (1 - score["agreement"]),
    }
    if floating["loss"] is None:
        del panels["increase of the loss (nats)"]
    bars = {"alone": "only this layer quantized", "others": "all but this layer quantized"}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), sharey=True)
        for ax, (name, value) in zip(axes, panels.items(), strict=True):
            for i, (key, label) in enumerate(bars.items()):
                rows = [row + WIDTH * (i - 0.5) for row in range(len(layers))]
                values = [value(layer[key]) for layer in layers]
                ax.barh(rows, values, WIDTH, color=BARS[1 + i], label=label)
            ax.axvline(value(result["quantized"]), ls="--", color="#404040", lw=1, label="all")
            ax.set(xlabel=name, ylim=(len(layers) - 0.5, -0.5))
            ax.grid(axis="y", visible=False)
            ax.locator_params(axis="x", nbins=4)
        names = [printable(layer["name"]) for layer in layers]
        axes[0].set_yticks(range(len(layers)), names, fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)

    return save_plot(path, (2.0 + 2.4 * len(panels), 0.3 * len(layers) + 1.4), draw)
