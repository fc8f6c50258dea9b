"""Common parts of the autograd wrappers of the fake-quantization ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from divqat.ops.reference import fake_quantize_backward_ref


def recomputing() -> bool:
    """Whether a backward is running, in which ``torch.utils.checkpoint`` recomputes the forward."""
    # A compiler does not trace the backward here, and does not support the function.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def batched(*grads: Tensor) -> bool:
    """Whether these are batched cotangents, of ``torch.autograd.grad(is_grads_batched=True)``.

    The kernels do not support them, and the dispatcher has a fallback only for ops that return a
    single tensor.
    """
    return not torch.compiler.is_compiling() and any(
        torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads
    )


def with_stride(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``grad`` with strides ``stride``: masks are in memory order, so the layouts must agree."""
    if grad.stride() == stride:
        return grad
    return grad.new_empty_strided(grad.shape, stride).copy_(grad)


def masked_grad(grad_y: Tensor, mask: Tensor) -> Tensor:
    """grad_y where the mask is set, else 0; differentiable if grad mode is enabled."""
    if torch.is_grad_enabled():
        return MaskedGrad.apply(grad_y, mask)
    return _masked(grad_y, mask)


def _masked(grad_y: Tensor, mask: Tensor) -> Tensor:
    # Decided by the saved mask: the backend may have changed since the forward.
    if mask.dtype == torch.bool:
        return fake_quantize_backward_ref(grad_y, mask)
    return torch.ops.divqat.fake_quantize_backward(grad_y, mask)


class MaskedGrad(torch.autograd.Function):
    """grad_x = grad_y where the mask is set, else 0.

    It is linear in grad_y, so it is its own derivative (double backward).
    """

    @staticmethod
    def forward(ctx: Any, grad_y: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.stride = grad_y.stride()
        return _masked(grad_y, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return MaskedGrad.apply(with_stride(grad, ctx.stride), mask), None
