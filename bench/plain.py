"""The same computations in pure PyTorch, written for a compiler: the simplest alternative to
divqat's kernels. Straight-through by a detached difference, computed in float32, without host
syncs, so that ``torch.compile(fullgraph=True)`` compiles them as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.case import Absent

# name → options of torch.compile, and whether they are for CUDA only
COMPILED: dict[str, tuple[dict[str, Any], bool]] = {
    "torch.compile": ({}, False),
    "torch.compile, cooperative_reductions": (
        {"options": {"triton.cooperative_reductions": True}}, True,
    ),
    "torch.compile, combo_kernels": ({"options": {"combo_kernels": True}}, True),
    "torch.compile, reduce-overhead": ({"mode": "reduce-overhead"}, True),
}  # fmt: skip


def compiled(function: Callable[..., Any], name: str, device: str) -> Callable[..., Any]:
    """``function`` compiled without graph breaks, for static shapes.

    Raises:
        Absent: these options are for CUDA only.
    """
    options, cuda_only = COMPILED[name]
    if cuda_only and device != "cuda":
        raise Absent("this option has no effect on the CPU, where Inductor generates C++")
    run = torch.compile(function, fullgraph=True, dynamic=False, **options)
    if options.get("mode") != "reduce-overhead":
        return run

    def step(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the last step may be overwritten
        return run(*args)

    return step


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes from ``low`` to ``high``; the gradient is 0 where ``x`` is clipped."""
    value = x.float()
    smallest, largest = (low - zero_point) * scale, (high - zero_point) * scale
    inside = value.clamp(smallest, largest)
    codes = ((value / scale).round() + zero_point).clamp(low, high)
    return (inside + ((codes - zero_point) * scale - inside).detach()).to(x.dtype)


class Observed(nn.Module):
    """Fake quantization with a moving-average range, optionally after ReLU."""

    def __init__(self, low: float, high: float, averaging_constant: float, relu: bool) -> None:
        super().__init__()
        self.register_buffer("min", torch.tensor(low))
        self.register_buffer("max", torch.tensor(high))
        self.averaging_constant = averaging_constant
        self.relu = relu

    def qparams(self) -> tuple[Tensor, Tensor]:
        scale = (self.max - self.min) / 255
        return scale, (-self.min / scale).round()

    def forward(self, x: Tensor) -> Tensor:
        if self.relu:
            x = F.relu(x)
        low, high = torch.aminmax(x.detach())
        self.min.lerp_(low.float(), self.averaging_constant)
        self.max.lerp_(high.float(), self.averaging_constant)
        return fake_quantize(x, *self.qparams(), 0, 255)


def learned(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """LSQ on a symmetric grid; autograd computes the gradient of the scale."""
    value = x.float() / scale
    clipped = value.clamp(low, high)
    return ((clipped + (clipped.round() - clipped).detach()) * scale).to(x.dtype)


def weights(*tensors: Tensor) -> list[Tensor]:
    """Each weight quantized per output channel, codes from -127 to 127; nothing is clipped."""
    outputs = []
    for w in tensors:
        value = w.detach()
        scale = value.abs().amax(tuple(range(1, w.dim())), keepdim=True) / 127
        outputs.append(w + ((value / scale).round() * scale - value))
    return outputs


def divergence_loss(
    logits: Tensor, teacher: Tensor, target: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    """CE − λ T² KL(student‖teacher), in float32."""
    z = logits.float()
    log_q = F.log_softmax(z / temperature, 1)
    log_p = F.log_softmax(teacher.float() / temperature, 1)
    # kl_div(input, target) is KL(target‖input)
    kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return F.cross_entropy(z, target) - weight * temperature**2 * kl
