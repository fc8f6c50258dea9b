"""BatchNorm with statistics over the batches of all processes.

``nn.SyncBatchNorm`` computes the same, but only on GPUs. This one works on every device, with one
all-reduce in the forward and one in the backward pass, and it can leave padding rows out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that normalizes by the statistics of all processes' images in training
    mode within :func:`synchronized_batchnorm`, and behaves like its base class otherwise.

    The running statistics also cover all processes' images, the variance with N / (N − 1), N the
    number of values per channel in all processes.

    Attributes:
        padding: how many leading rows of the input do not count; None outside the block.
    """

    padding: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, H, W] → [n, C, H, W]."""
        if self.padding is None or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, count = _statistics(input.detach()[self.padding :])
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            # Of a single value the variance is 0, and the divisor must not be 0.
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        settings = self.eps, self.padding
        return _Normalize.apply(input, self.weight, self.bias, mean, var, count, *settings)


def synchronize_batchnorm(model: nn.Module) -> None:
    """Turn every BatchNorm of ``model`` into a :class:`SyncBatchNorm2d`, in place.

    This includes the BatchNorm of a :class:`divqat.nn.QuantConvBn2d`. Parameters, buffers, names
    and hooks stay.

    Raises:
        ValueError: a BatchNorm is not an ``nn.BatchNorm2d``, or lacks γ and β, running statistics
            or momentum.
    """
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        supported = norm.affine and norm.track_running_stats and norm.momentum is not None
        if type(norm) is not nn.BatchNorm2d or not supported:
            raise ValueError(
                f"model: wanted nn.BatchNorm2d with γ, β, running statistics and momentum, got "
                f"{name}: {norm}"
            )
        norm.__class__ = SyncBatchNorm2d  # like torch's parametrizations


@contextmanager
def synchronized_batchnorm(model: nn.Module, padding: int) -> Iterator[None]:
    """Within this block all processes run ``model`` forward, each on its part of the batch.

    Each BatchNorm in training mode costs one all-reduce in the forward and one in the backward
    pass, which may run after the block.

    Args:
        model: from :func:`synchronize_batchnorm`; any other model is not affected.
        padding: how many leading rows of this process's input do not belong to the batch. They are
            normalized, but left out of the statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, SyncBatchNorm2d)]
    try:
        for norm in norms:
            norm.padding = padding
        yield
    finally:
        for norm in norms:
            norm.padding = None


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over all processes' ``x``, and the number of values per channel.

    Each process computes mean and variance as ``nn.BatchNorm2d`` does, and turns them into
    [Σ x, Σ x², n] in float64, which the all-reduce sums. In float64 the cancellation in
    Σ x² / N − mean² stays below float32's rounding up to a mean of 10^4 standard deviations.

    Args:
        x: [n, C, H, W]; n may be 0.

    Returns:
        [C], [C] and [1]; float64 for float64 input, else float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    n = x.numel() // channels
    moments = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if n:
        # Unused, but with float32 running statistics the op also accepts bfloat16 input.
        running = x.new_zeros(2, channels, dtype=dtype)
        statistics = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
        mean, var = (value.double() for value in statistics)
        moments = torch.cat([n * mean, n * (var + mean.square()), torch.full_like(mean[:1], n)])
    dist.all_reduce(moments)
    total, squares, count = moments.split([channels, channels, 1])
    mean = total / count
    var = (squares / count - mean.square()).clamp(min=0)
    return mean.to(dtype), var.to(dtype), count.to(dtype)


class _Normalize(torch.autograd.Function):
    """y = γ x̂ + β, x̂ = (x − mean) / √(var + eps), with the gradient through the statistics of all
    processes' x.

    With Σ over the rows of all processes and N values per channel:
    dL/dx = γ / √(var + eps) · (dL/dy − (Σ dL/dy + x̂ Σ x̂ dL/dy) / N) (Ioffe and Szegedy 2015, §3,
    the derivatives after algorithm 1, combined). For padding rows the second term is left out. The
    gradients of γ and β are those of this process's rows, as for all other parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        padding: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.padding = eps, padding
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        # γ / √(var + eps) · dL/dy, Σ x̂ dL/dy and Σ dL/dy of this process
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([dweight, dbias])
        dist.all_reduce(sums)
        # The second term is affine in x̂, so batch_norm computes it.
        factor = -weight * torch.rsqrt(var + ctx.eps) / count
        gamma, beta = (factor * part for part in sums.chunk(2))
        dx[ctx.padding :] += F.batch_norm(x[ctx.padding :], mean, var, gamma, beta, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None, None
