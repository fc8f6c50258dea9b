"""What is measured on the CPU: each case is ours, its peers, and a copy of the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from divqat import ops

aten = torch.ops.aten
call = torch.ops.divqat
INT32 = torch.int32


@dataclass
class Case:
    """One row of the report.

    Attributes:
        name: what is computed, on what.
        ours, peers: forward and backward, as a user's autograd runs them, returning what to check.
        bytes: memory that the computation has to move at least (reads and writes).
        copied: the tensors whose copy is the yardstick.
        tolerance: of the check between ours and each peer; 0 is bit-equal.
    """

    name: str
    ours: Callable[[], list[Tensor]]
    peers: dict[str, Callable[[], list[Tensor]]]
    bytes: float
    copied: list[Tensor]
    tolerance: float = 0.0
    extra: dict[str, Callable[[], object]] = field(default_factory=dict)

    def check(self) -> None:
        """Every peer must compute what we compute.

        Raises:
            AssertionError: one does not; then nothing is timed.
        """
        mine = self.ours()
        for peer in self.peers.values():
            for a, b in zip(mine, peer(), strict=True):
                torch.testing.assert_close(a, b, rtol=self.tolerance, atol=self.tolerance / 100)


def fake_quantize(megabytes: float) -> Case:
    """Per tensor, forward and backward: 8.125 + 8.125 bytes per float32 element."""
    x, grad = _activation(megabytes)
    scale, zero_point = torch.tensor(0.03), torch.tensor(3, dtype=INT32)

    def ours() -> list[Tensor]:
        y, mask = call.fake_quantize(x, scale, zero_point, -128, 127, None, True)
        return [y, call.fake_quantize_backward(grad, mask)]

    def peer() -> list[Tensor]:
        y, mask = aten.fake_quantize_per_tensor_affine_cachemask(x, 0.03, 3, -128, 127)
        return [y, aten.fake_quantize_per_tensor_affine_cachemask_backward(grad, mask)]

    name = f"fake_quantize, {megabytes:g} MB"
    return Case(name, ours, {"ATen cachemask": peer}, 16.25 * x.numel(), [x])


def observed(megabytes: float, mode: str) -> Case:
    """With a moving-average range: 20.25 bytes per element exact, 16.25 delayed."""
    x, grad = _activation(megabytes)
    state = (torch.tensor(-6.0), torch.tensor(6.0), torch.tensor(0.05), torch.tensor(128).int())
    theirs = [torch.tensor([v]) for v in (-6.0, 6.0, 0.05)] + [torch.tensor([128]).int()]
    on = torch.ones(1, dtype=torch.int64)

    def ours() -> list[Tensor]:
        rest = (0, 255, None, 0.01, False, mode, False)
        y, mask = call.fake_quantize_observed(x, *state, *rest)
        return [y, call.fake_quantize_backward(grad, mask)]

    def peer() -> list[Tensor]:
        y, mask = aten._fused_moving_avg_obs_fq_helper(
            x, on, on, *theirs, 0.01, 0, 255, 0, False, False
        )
        return [y, aten.fake_quantize_per_tensor_affine_cachemask_backward(grad, mask)]

    # The peer computes scales in float64 and rounds them differently: one level may differ.
    name = f"fake_quantize_observed {mode}, {megabytes:g} MB"
    size = (20.25 if mode == "exact" else 16.25) * x.numel()
    case = Case(name, ours, {"ATen fused observer": peer}, size, [x])
    case.check = lambda: _check_observed(ours(), peer())  # type: ignore[method-assign]
    return case


def _check_observed(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert (mine[0] - theirs[0]).abs().max() < 0.1  # two levels of about 0.05
    assert (mine[1] != theirs[1]).float().mean() < 1e-3


def learned(megabytes: float) -> Case:
    """LSQ, per tensor: 8 + 12 bytes per element."""
    x, grad = _activation(megabytes)
    scale, zero_point = torch.tensor([0.03]), torch.tensor([3.0])

    def ours() -> list[Tensor]:
        y = call.fake_quantize_lsq(x, scale, zero_point, -128, 127, None)
        grads = call.fake_quantize_lsq_backward(grad, x, scale, zero_point, -128, 127, None, 1e-3)
        return [y, *grads]

    def peer() -> list[Tensor]:
        args = (scale, zero_point, -128, 127, 1e-3)
        y = aten._fake_quantize_learnable_per_tensor_affine(x, *args)
        grads = aten._fake_quantize_learnable_per_tensor_affine_backward(grad, x, *args)
        return [y, *grads]

    name = f"fake_quantize_lsq, {megabytes:g} MB"
    return Case(name, ours, {"ATen learnable": peer}, 20 * x.numel(), [x], tolerance=1e-3)


def resnet50_weights() -> list[Tensor]:
    """Tensors of the shapes of ResNet-50's 53 convolutions and its linear layer (25.5 M)."""
    shapes, channels = [(64, 3, 7, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).mul_(0.05) for shape in [*shapes, (1000, 2048)]]


def weights(quant_min: int) -> Case:
    """All weights of ResNet-50, per channel: 8 bytes per element, 20 if codes can be clipped."""
    list_ = [w.requires_grad_() for w in resnet50_weights()]
    grads = [torch.randn_like(w) for w in list_]
    levels = 127 - quant_min

    def ours() -> list[Tensor]:
        outputs = ops.fake_quantize_weights(list_, quant_min, 127)
        return [*_detached(outputs), *torch.autograd.grad(outputs, list_, grads)]

    def peer() -> list[Tensor]:
        outputs = []
        for w in list_:
            scale = w.detach().flatten(1).abs().amax(1) * 2 / levels
            zero_point = torch.zeros(len(w), dtype=INT32)
            op = torch.fake_quantize_per_channel_affine
            outputs.append(op(w, scale, zero_point, 0, quant_min, 127))
        return [*_detached(outputs), *torch.autograd.grad(outputs, list_, grads)]

    per_element = 8 if quant_min == -127 else 20
    name = f"fake_quantize_weights, ResNet-50, codes {quant_min} to 127"
    size = per_element * sum(w.numel() for w in list_)
    return Case(name, ours, {"torch, a loop": peer}, size, _detached(list_))


def _detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def loss(n: int, c: int, compile_: bool = True) -> Case:
    """Value and gradient from raw logits: 12 bytes per logit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, c, generator=generator).mul_(3).requires_grad_()
    teacher = torch.randn(n, c, generator=generator).mul_(3)
    target = torch.randint(0, c, (n,), generator=generator)

    def eager(z: Tensor) -> Tensor:
        log_q = F.log_softmax(z / 4, 1)
        log_p = F.log_softmax(teacher / 4, 1)
        # kl_div(input, target) is KL(target‖input): KL(q‖p) as DivQAT has it
        kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return F.cross_entropy(z, target) - 0.1 * 16 * kl

    def gradient(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        value = function(logits)
        return [value.detach(), *torch.autograd.grad(value, logits)]

    weight = torch.tensor(0.1)

    def ours() -> list[Tensor]:
        return gradient(
            lambda z: ops.divergence_loss(z, teacher, target, weight=weight, temperature=4.0)
        )

    peers = {"eager": lambda: gradient(eager)}
    if compile_:
        compiled = torch.compile(eager)
        peers["torch.compile"] = lambda: gradient(compiled)
    name = f"divergence_loss, [{n}, {c}]"
    return Case(name, ours, peers, 12 * n * c, [logits.detach()], tolerance=1e-4)


def _activation(megabytes: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    n = round(megabytes * 2**18)
    return tuple(torch.randn(n, generator=generator) for _ in range(2))  # type: ignore[return-value]


def all_cases() -> Iterator[Callable[[], Case]]:
    """In the order of the report; made one at a time, so that only one's memory is held."""
    sizes = (1, 4, 9.6, 16, 32, 64)
    for megabytes in sizes:
        yield lambda mb=megabytes: fake_quantize(mb)
    for mode in ("exact", "delayed"):
        for megabytes in sizes:
            yield lambda mb=megabytes, mode=mode: observed(mb, mode)
    for megabytes in (4, 16):
        yield lambda mb=megabytes: learned(mb)
    for quant_min in (-127, -128):
        yield lambda quant_min=quant_min: weights(quant_min)
    for n, c in ((128, 10), (1024, 100), (1024, 1000), (256, 21841)):
        yield lambda n=n, c=c: loss(n, c)
