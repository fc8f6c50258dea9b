"""The table of a model's layers with the kernel that a runtime runs for each."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from divqat import quantize
from divqat._util.errors import unknown_name
from divqat.export.onnx import export_onnx
from divqat.export.placement import Placement, placements
from divqat.quantize.summary import Row, Summary

RUNTIMES = ("onnxruntime",)


def summary(model: nn.Module, example_input: Any, *, runtime: str = "onnxruntime") -> Summary:
    """:func:`divqat.summary` with the kernel that a default session runs for each layer.

    The model is exported to a temporary file, and the runtime's optimized graph is read. A layer
    that runs in float has the reason. A layer with a weight that is not quantized is a row, too.

    Args:
        model: made by :func:`divqat.prepare`, trained or calibrated.
        example_input: see :func:`divqat.export.export_onnx`.
        runtime: ``"onnxruntime"``.

    Raises:
        ValueError: an unknown runtime, or see ``export_onnx``.
    """
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    table = quantize.summary(model, example_input)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saturation
        path = Path(folder) / "model.onnx"
        export_onnx(model, example_input, path)
        found: dict[str, list[Placement]] = {}
        for placement in placements(path):
            if placement.weighted:
                found.setdefault(placement.module, []).append(placement)
    rows = [_placed(row, found.pop(row.layer, [])) for row in table.rows]
    rows += [_placed(Row(layer=name, kind="weight"), calls) for name, calls in found.items()]
    return Summary(rows)


def _placed(row: Row, calls: list[Placement]) -> Row:
    """``row`` with the kernels of the calls of its layer."""
    if row.kind != "weight" or not calls:
        return row
    kernels = ", ".join(dict.fromkeys(call.kernel or "float" for call in calls))
    reasons = ", ".join(dict.fromkeys(call.reason for call in calls if call.reason))
    return replace(row, kernel=kernels, reason=reasons)
