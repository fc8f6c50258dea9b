"""Fake quantization of all weights of a network, per output channel, codes from -127 to 127."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench import plain, torch_ao
from bench.case import LAYOUTS, Case, Contender, Inputs, Plan, import_peer, our_backends
from bench.case import rotations as rotations_for
from bench.nets import NETWORKS
from bench.nets import weights as weights_of
from divqat import ops

OP = "fake_quantize_weights"


def plans(device: str, dtypes: list[str], layouts: list[str]) -> Iterator[Plan]:
    """The weights of each network; in training they are float32 even if activations are not."""
    if "float32" in dtypes:
        for layout in layouts:
            for name in NETWORKS:
                yield Plan(OP, f"{name}, {len(weights_of(name))} weights", (), "float32", layout)


def case(plan: Plan, device: str, rotations: int | None = None) -> Case:
    """Allocate the inputs of a plan."""
    return case_of(plan, weights_of(plan.on.partition(",")[0]), device, rotations)


def case_of(plan: Plan, weights: list[Tensor], device: str, rotations: int | None = None) -> Case:
    """The case of the given weights."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> list[Tensor]:
        tensors = [torch.randn(w.shape, generator=generator).mul_(0.05).to(device) for w in weights]
        return [
            t.contiguous(memory_format=LAYOUTS[plan.layout]) if t.dim() == 4 else t for t in tensors
        ]

    elements = sum(w.numel() for w in weights)
    count = (rotations or rotations_for(4 * elements, device)) + 1
    lists = [drawn() for _ in range(count)]
    sets = []
    for tensors, grads in pairwise(lists):
        leaves = [t.detach().requires_grad_() for t in tensors]
        sets.append(Inputs(tuple(leaves), leaves, grads))
    return Case(
        plan,
        sets,
        bytes=8 * elements,  # nothing is clipped: the gradient passes unchanged
        copied=lists[:-1],
        contenders=_contenders(device, weights),
        check=_check,
        inputs_live_on=True,
    )


def _contenders(device: str, weights: list[Tensor]) -> dict[str, Callable[[], Contender]]:
    contenders: dict[str, Callable[[], Contender]] = {}
    for name, backend in our_backends(device).items():
        contenders[name] = lambda b=backend: Contender(
            lambda *w: ops.fake_quantize_weights(w, -127, 127), backend=b()
        )
    for name in torch_ao.QUANTIZERS:
        contenders[name] = lambda name=name: _modules(name, weights, device)
    contenders |= {
        "torch.fake_quantize_per_channel_affine": _aten,
        "Brevitas": lambda: _brevitas(weights, device),
        "PyTorch, eager": lambda: Contender(plain.weights),
    }
    for name in plain.COMPILED:
        contenders[name] = lambda name=name: Contender(plain.compiled(plain.weights, name, device))
    return contenders


def _aten(*_: Any) -> Contender:
    def forward(*weights: Tensor) -> list[Tensor]:
        outputs = []
        for w in weights:
            scale = w.detach().flatten(1).abs().amax(1) / 127
            zero_point = torch.zeros(len(w), dtype=torch.int32, device=w.device)
            op = torch.fake_quantize_per_channel_affine
            outputs.append(op(w, scale, zero_point, 0, -127, 127))
        return outputs

    return Contender(forward)


def _modules(name: str, weights: list[Tensor], device: str) -> Contender:
    """A module of torch.ao or torchao per weight, with their default settings for QAT."""
    options: dict[str, Any] = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0}
    options |= {"quant_min": -127, "quant_max": 127}
    observer = "MovingAveragePerChannelMinMaxObserver"
    modules = [
        torch_ao.quantizer(name, observer, signed=True, **options).to(device) for _ in weights
    ]
    return Contender(
        lambda *ws: [m(w) for m, w in zip(modules, ws, strict=True)],
        facts=lambda: {"scales": [m.scale for m in modules], "largest_differ": True},
    )


def _brevitas(weights: list[Tensor], device: str) -> Contender:
    """The weight quantizers of Brevitas's layers: the scale is the largest value of the row, and
    differentiated as well."""
    layers: Any = import_peer("brevitas.nn", "brevitas")
    quant: Any = import_peer("brevitas.quant", "brevitas").Int8WeightPerChannelFloat
    quantizers = []
    for w in weights:
        options = {"bias": False, "weight_quant": quant}
        if w.dim() == 4:
            layer = layers.QuantConv2d(w.shape[1], w.shape[0], w.shape[2:], **options)
        else:
            layer = layers.QuantLinear(w.shape[1], w.shape[0], **options)
        quantizers.append(layer.to(device).weight_quant)
    return Contender(
        lambda *ws: [q(w).value for q, w in zip(quantizers, ws, strict=True)],
        facts=lambda: {"largest_differ": True},
    )


def _check(
    contender: Contender, inputs: Inputs, outputs: list[Tensor], grads: list[Tensor]
) -> None:
    """Compare with the definition in float64: on the row's grid, at most half a step away, and the
    gradient passes.

    A row's largest value may differ: Brevitas differentiates the scale, which this value sets, and
    the scale of torch.ao's fused op is slightly smaller, so that the value is clipped. (On a row
    whose values have one sign, that op uses a zero point and half the scale, although a symmetric
    grid was requested. Here this counts as wrong.)"""
    facts = contender.facts()
    for i, (w, y, dw) in enumerate(zip(inputs.leaves, outputs, grads, strict=True)):
        assert y.shape == w.shape and y.dtype == w.dtype
        rows, values = w.detach().double().flatten(1), y.detach().double().flatten(1)
        largest = rows.abs().amax(1, keepdim=True)
        scale = largest / 127
        if "scales" in facts:
            scale = facts["scales"][i].double()[:, None]
            ratio = (scale / (largest / 127)).min().item()
            assert 0.99 < ratio < 1.01, f"scale: down to {ratio:.2f} of that of the largest value"
        assert ((values - rows).abs() <= 0.501 * scale).all(), "more than half a step away"
        codes = values / scale
        assert ((codes - codes.round()).abs() <= 1e-3).all(), "not on the grid"
        grad = inputs.grads[i].flatten(1)  # type: ignore[index]
        same = (dw.flatten(1) - grad).abs() <= 2 * torch.finfo(w.dtype).eps * grad.abs()
        if facts.get("largest_differ"):
            same |= rows.abs() == largest
        assert same.all(), "gradient"
