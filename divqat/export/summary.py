"""The table of a model's layers, with the kernel that a runtime runs for each."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from divqat._util.errors import unknown_name
from divqat.export.onnx import export_onnx
from divqat.export.placement import Placement, placements
from divqat.quantize.summary import Row, Summary, summarize

RUNTIMES = ("onnxruntime",)


def summary(model: nn.Module, example_input: Any = None, *, runtime: str | None = None) -> Summary:
    """Layer, bits, scheme, scale range, clipped share and SQNR of a prepared model; and the kernel
    that a runtime runs for each layer.

    For the kernels, the model is exported to a temporary file, and the graph that a default session
    of the runtime makes of it is read. A layer that runs in float has the reason. A layer with a
    weight that is not quantized is a row, too.

    Args:
        model: made by :func:`divqat.prepare`; its state is not changed. For a runtime, it has to be
            trained or calibrated.
        example_input: a batch on which the activations are measured, or the arguments as for
            :func:`divqat.prepare`; None: only weights have a clipped share and an SQNR. A runtime
            needs it.
        runtime: ``"onnxruntime"``; None: no kernels.

    Raises:
        ValueError: ``model`` has no quantized layer or fake-quantizer, or is converted; an unknown
            runtime; a runtime without ``example_input``; or see :func:`divqat.export.export_onnx`.
    """
    table = summarize(model, example_input)
    if runtime is None:
        return table
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    if example_input is None:
        raise ValueError("example_input: wanted a batch for the export to a runtime, got None")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saturation
        path = Path(folder) / "model.onnx"
        export_onnx(model, example_input, path)
        return with_kernels(table, path)


def with_kernels(table: Summary, path: str | Path) -> Summary:
    """``table`` with the kernels of the exported model in ``path``, in a default session of ONNX
    Runtime."""
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
