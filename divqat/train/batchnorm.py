"""BatchNorm over the whole batch, where that is spread over several processes.

``nn.SyncBatchNorm`` computes the same, on GPUs only. This one is an all-reduce each way, on any
device, and its images may be fewer than its rows.
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


class WholeBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that in a block of :func:`whole_batch` and in training mode normalizes by
    the statistics of all processes' images; elsewhere it is what it is.

    Running statistics are those of all processes' images, too, the variance with N / (N − 1), N
    the values per channel in all of them.

    Attributes:
        fillers: first rows of the input that do not count, within the block; None: outside.
    """

    fillers: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, H, W] → [n, C, H, W]."""
        if self.fillers is None or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, count = _statistics(input.detach()[self.fillers :])
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            # A single value has no variance, and no divisor of 0 either.
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        settings = self.eps, self.fillers
        return _Normalize.apply(input, self.weight, self.bias, mean, var, count, *settings)


def synchronize_batchnorm(model: nn.Module) -> None:
    """Make every BatchNorm of ``model`` a :class:`WholeBatchNorm2d`, in its place.

    Parameters, buffers, names and hooks stay; the one within a :class:`divqat.nn.QuantConvBn2d` is
    one of them.

    Raises:
        ValueError: a BatchNorm that is not an ``nn.BatchNorm2d``, or one without γ and β, running
            statistics or momentum.
    """
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        whole = norm.affine and norm.track_running_stats and norm.momentum is not None
        if type(norm) is not nn.BatchNorm2d or not whole:
            raise ValueError(
                f"model: wanted nn.BatchNorm2d with γ, β, running statistics and momentum, got "
                f"{name}: {norm}"
            )
        norm.__class__ = WholeBatchNorm2d  # as torch's parametrizations do it


@contextmanager
def whole_batch(model: nn.Module, fillers: int) -> Iterator[None]:
    """A block in which all processes run ``model`` forward, each on its part of the batch.

    One all-reduce per BatchNorm in training mode; so is the backward, in the block or after it.

    Args:
        model: of :func:`synchronize_batchnorm`, or any, which stays as it is.
        fillers: how many of the first rows of this process's part are not of the batch. They are
            normalized by the statistics, and do not count in them.
    """
    norms = [module for module in model.modules() if isinstance(module, WholeBatchNorm2d)]
    try:
        for norm in norms:
            norm.fillers = fillers
        yield
    finally:
        for norm in norms:
            norm.fillers = None


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of all processes' ``x``, and how many values of a channel they are.

    Each process takes its mean and variance as ``nn.BatchNorm2d`` does. What is added up is
    [Σ x, Σ x², n] out of them, in float64: there the cancellation of Σ x² / N − mean² stays below
    float32's rounding up to a mean of 10^4 standard deviations.

    Args:
        x: [n, C, H, W]; n may be 0.

    Returns:
        [C], [C] and [1], float32, or float64 for float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    n = x.numel() // channels
    moments = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if n:
        # Running statistics of float32 let it take bfloat16, too; nothing else reads them.
        running = x.new_zeros(2, channels, dtype=dtype)
        own = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
        mean, var = (value.double() for value in own)
        moments = torch.cat([n * mean, n * (var + mean.square()), torch.full_like(mean[:1], n)])
    dist.all_reduce(moments)
    total, squares, count = moments.split([channels, channels, 1])
    mean = total / count
    var = (squares / count - mean.square()).clamp(min=0)
    return mean.to(dtype), var.to(dtype), count.to(dtype)


class _Normalize(torch.autograd.Function):
    """y = γ x̂ + β, x̂ = (x − mean) / √(var + eps), with the gradient that passes through the
    statistics of all processes' x.

    With Σ over all processes' rows, N the number of values that the statistics are of:
    dL/dx = γ / √(var + eps) · (dL/dy − (Σ dL/dy + x̂ Σ x̂ dL/dy) / N) (Ioffe and Szegedy 2015, §3,
    the derivatives after algorithm 1, put together), where a filler lacks the second term. Of γ
    and β each process keeps its own part of the gradient, as of all other parameters.
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
        fillers: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.fillers = eps, fillers
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
        # What is left is affine in x̂, as a BatchNorm is.
        factor = -weight * torch.rsqrt(var + ctx.eps) / count
        gamma, beta = (factor * part for part in sums.chunk(2))
        dx[ctx.fillers :] += F.batch_norm(x[ctx.fillers :], mean, var, gamma, beta, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None, None
