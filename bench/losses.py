"""Cross-entropy minus a divergence from a teacher: value and gradient from raw logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import plain
from bench.case import DTYPES, Absent, Case, Contender, Inputs, Plan, import_peer, our_backends
from bench.case import rotations as rotations_for
from divqat import ops

OP = "divergence_loss"
SHAPES = [
    (n, c)
    for c in (10, 100, 1000, 21841)
    for n in (64, 1024, 4096)
    if n * c < 2**25  # 128 MB in float32
]
WEIGHT, TEMPERATURE = 0.1, 4.0


def plans(device: str, dtypes: list[str], layouts: list[str]) -> Iterator[Plan]:
    """Logits of 64 to 4096 samples and 10 to 21841 classes."""
    for dtype in dtypes:
        for n, c in SHAPES:
            yield Plan(OP, f"logits {[n, c]}", (n, c), dtype)


def case(plan: Plan, device: str, rotations: int | None = None) -> Case:
    """Allocate the inputs of a plan."""
    dtype = DTYPES[plan.dtype]
    n, c = plan.shape
    generator = torch.Generator().manual_seed(0)
    nbytes = n * c * dtype.itemsize
    sets, copied = [], []
    # both the student's and the teacher's logits are read: half as many turns fill the cache
    for _ in range(rotations or rotations_for(2 * nbytes, device)):
        logits, teacher = (
            torch.randn(n, c, generator=generator).mul_(3).to(device, dtype) for _ in range(2)
        )
        target = torch.randint(0, c, (n,), generator=generator).to(device)
        leaf = logits.detach().requires_grad_()
        sets.append(Inputs((leaf, teacher, target), [leaf], None))
        copied.append([logits])
    return Case(
        plan,
        sets,
        bytes=3 * nbytes,
        copied=copied,
        contenders=_contenders(device),
        check=_check,
    )


def _contenders(device: str) -> dict[str, Callable[[], Contender]]:
    weight = torch.tensor(WEIGHT, device=device)

    def ours(logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return ops.divergence_loss(logits, teacher, target, weight=weight, temperature=TEMPERATURE)

    def eager(logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return plain.divergence_loss(logits, teacher, target, weight, TEMPERATURE)

    contenders: dict[str, Callable[[], Contender]] = {}
    for name, backend in our_backends(device).items():
        contenders[name] = lambda b=backend: Contender(ours, backend=b())
    contenders["PyTorch, eager"] = lambda: Contender(eager)
    for name in plain.COMPILED:
        contenders[name] = lambda name=name: Contender(plain.compiled(eager, name, device))
    contenders["Liger"] = lambda: _liger(device)
    return contenders


def _liger(device: str) -> Contender:
    """Liger's kernels for both terms: cross-entropy from logits, KL(q‖p) from log-probabilities."""
    kernels: Any = import_peer("liger_kernel.transformers", "liger-kernel")
    if device != "cuda":
        raise Absent("its kernels are Triton's, for GPUs")
    cross_entropy = kernels.LigerCrossEntropyLoss()
    divergence = kernels.LigerJSD(beta=1.0)  # KL(student‖teacher)

    def forward(logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        log_q = F.log_softmax(logits.float() / TEMPERATURE, 1)
        log_p = F.log_softmax(teacher.float() / TEMPERATURE, 1)
        # its cross-entropy overwrites the logits, which the divergence needs, with the gradient
        value = cross_entropy(logits.clone(), target)
        return value - WEIGHT * TEMPERATURE**2 * divergence(log_q, log_p)

    return Contender(forward)


def _check(
    contender: Contender, inputs: Inputs, outputs: list[Tensor], grads: list[Tensor]
) -> None:
    """Compare with the textbook formula in float64."""
    logits, teacher, target = inputs.args
    z = logits.detach().double().requires_grad_()
    p = torch.softmax(teacher.double() / TEMPERATURE, 1)
    q = torch.softmax(z / TEMPERATURE, 1)
    kl = (q * (q.log() - p.log())).sum(1).mean()
    picked = torch.softmax(z, 1)[torch.arange(len(z)), target]
    wanted = -picked.log().mean() - WEIGHT * TEMPERATURE**2 * kl
    (slope,) = torch.autograd.grad(wanted, z)
    value, gradient = outputs[0].double(), grads[0].double()
    assert gradient.shape == z.shape and grads[0].dtype == logits.dtype
    assert math.isclose(value.item(), wanted.item(), rel_tol=1e-5, abs_tol=1e-5), f"{value}"
    # computed in float32, with one rounding to the logits' dtype
    tolerance = torch.finfo(logits.dtype).eps * slope.abs() + 1e-6 / len(z)
    error = (gradient - slope).abs()
    assert (error <= tolerance + 1e-4 * slope.abs()).all(), f"gradient off by {error.max()}"
