"""A table of the quantization of each layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.modes import modes_kept
from divqat._util.text import columns
from divqat.nn._layer import QuantLayer
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.ops.reference import along
from divqat.quantize.checks import as_call, check_is_prepared
from divqat.quantize.functional import weights_known


@dataclass(frozen=True)
class Row:
    """One quantized tensor.

    Attributes:
        layer: the module's name.
        kind: ``"weight"`` or ``"activation"``.
        bits: width of a code.
        scheme: the grid in words.
        scale_min, scale_max: smallest and largest scale; None before the first batch.
        clipped: share of the elements outside the grid, in [0, 1]; None without data.
        sqnr_db: signal to quantization noise ratio, 10 log10(Σ x² / Σ (x − Q(x))²), in decibels;
            None without data, signal or noise.
        kernel: what a runtime runs for the layer; None: not asked, or no layer.
        reason: why that computes in float; "" for an integer kernel.
    """

    layer: str
    kind: str
    bits: int = 32
    scheme: str = "float"
    scale_min: float | None = None
    scale_max: float | None = None
    clipped: float | None = None
    sqnr_db: float | None = None
    kernel: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Summary:
    """The rows of :func:`divqat.summary`; ``str()`` is a table."""

    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        asked = any(row.kernel is not None for row in self.rows)
        rows = [asdict(row) for row in self.rows]
        for row in rows if not asked else ():
            del row["kernel"], row["reason"]
        return {"rows": rows}

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [
            ("layer", "tensor", "scheme", "scale", "clipped", "SQNR dB", "runs as")
        ]
        for row in self.rows:
            if row.scale_min is None:
                scale = "-"
            elif row.scale_min == row.scale_max:
                scale = f"{row.scale_min:.3g}"
            else:
                scale = f"{row.scale_min:.3g} … {row.scale_max:.3g}"
            clipped = "-" if row.clipped is None else f"{row.clipped:.2%}"
            sqnr = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
            runs = f"{row.kernel or ''}{f': {row.reason}' if row.reason else ''}"
            cells.append((row.layer, row.kind, row.scheme, scale, clipped, sqnr, runs))
        if not any(row.kernel for row in self.rows):
            cells = [line[:-1] for line in cells]
        return columns(cells)


@torch.no_grad()
def summarize(model: nn.Module, example_input: Any = None) -> Summary:
    """:func:`divqat.summary` without a runtime."""
    check_is_prepared("model", model, (QuantLayer, FakeQuantize, LearnedStepFakeQuantize))
    inputs = {} if example_input is None else _activations(model, example_input)
    with weights_known(model):
        return Summary(_rows(model, inputs))


def _rows(model: nn.Module, inputs: dict[str, Tensor]) -> list[Row]:
    """The rows of a model whose activation quantizers have these inputs."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            if module.weight is None:
                continue  # a function that only training mode calls
            spec, scale = module.weight_spec, module.weight_qparams()
            zero_point = torch.zeros_like(scale)
            values, axis = module.folded()[0].detach(), module._weight_axis
            kind, learned = "weight", module.weight_fake_quantize
            known = learned is None or learned.has_range()
        elif isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)):
            if name.endswith("weight_fake_quantize"):
                continue  # reported with its layer
            spec, axis, kind = module.spec, module.ch_axis, "activation"
            scale, zero_point = module.calculate_qparams()
            values = inputs.get(name)  # type: ignore[assignment]
            known = module.has_range()
        else:
            continue
        clipped, sqnr = None, None
        if values is not None and known:
            axis = None if axis is None else axis % values.dim()
            s, z = along(scale, values, axis), along(zero_point, values, axis)
            q = torch.round(values * s.reciprocal()) + z
            level = q.clamp(spec.quant_min, spec.quant_max)
            clipped = float((q != level).float().mean())
            noise = float(((level - z) * s - values).double().square().sum())
            signal = float(values.double().square().sum())
            sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
        rows.append(
            Row(
                layer=name,
                kind=kind,
                bits=spec.bits,
                scheme=str(spec),
                scale_min=float(scale.min()) if known else None,
                scale_max=float(scale.max()) if known else None,
                clipped=clipped,
                sqnr_db=sqnr,
            )
        )
    return rows


def _activations(model: nn.Module, example_input: Any) -> dict[str, Tensor]:
    """The input of each activation quantizer, after a fused ReLU, on ``example_input``."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantize, LearnedStepFakeQuantize)):

            def record(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                x = args[0].detach().float()
                # a copy: the quantizer may overwrite its input
                inputs[name] = x.relu() if module.relu else x.clone()

            handles.append(module.register_forward_pre_hook(record))
    args, kwargs = as_call(example_input)
    try:
        with modes_kept(model):
            model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
