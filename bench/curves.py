"""The sweeps of ``python -m bench scale``, and their curves."""

from __future__ import annotations

from typing import Any

import numpy as np

OBSERVED = "fake_quantize_observed"
# sweep → (label of the size, sizes on the CPU, sizes on CUDA)
SWEEPS: dict[str, tuple[str, list[int], list[int]]] = {
    "elements": (
        f"elements of the activation ({OBSERVED})",
        [2**k for k in range(12, 25, 2)],
        [2**k for k in range(12, 29, 2)],
    ),
    "classes": (
        "classes (divergence_loss, 256 samples)",
        [10, 32, 100, 316, 1000, 3162, 10000],
        [10, 32, 100, 316, 1000, 3162, 10000, 31623],
    ),
    "layers": (
        "weights of 64x64x3x3 (fake_quantize_weights)",
        [1, 2, 4, 8, 16, 32, 64],
        [1, 4, 16, 64, 256],
    ),
    "batch": (
        "images per step (ResNet-20)",
        [16, 32, 64, 128, 256],
        [64, 128, 256, 512, 1024, 2048, 4096],
    ),
    "threads": (f"CPU threads ({OBSERVED}, 4 M elements)", [], []),
}


def curves(
    rows: list[dict[str, Any]], sweep: str, value: str = "milliseconds"
) -> dict[str, tuple[list[float], list[float]]]:
    """Contender → (sizes, values): median milliseconds, or another column."""
    by_contender: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["sweep"] != sweep or "milliseconds" not in row:
            continue
        y = row["milliseconds"]["median"] if value == "milliseconds" else row[value]
        xs, ys = by_contender.setdefault(row["contender"], ([], []))
        xs.append(row["size"])
        ys.append(y)
    return by_contender


def exponent(x: list[float], y: list[float]) -> tuple[float, float | None]:
    """k of y ∝ x^k by least squares on the upper half of the sizes, and its standard error.

    The error is None for fewer than three points, which always fit a line.
    """
    order = np.argsort(x)
    first = min(len(x) // 2, max(0, len(x) - 3))
    logs = np.log(np.array([x, y], dtype=float)[:, order[first:]])
    if logs.shape[1] < 3:
        return float(np.polyfit(*logs, 1)[0]), None
    (slope, _), covariance = np.polyfit(*logs, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))
