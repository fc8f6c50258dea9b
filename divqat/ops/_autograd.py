"""What the autograd wrappers of the fake-quantization ops share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from divqat.ops.reference import fake_quantize_backward_ref


def recomputing() -> bool:
    """Whether a backward is running: ``torch.utils.checkpoint`` calls the forward again in it."""
    # A compiler traces no backward, and does not know the function.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def batched(*grads: Tensor) -> bool:
    """Whether these are several cotangents at once: ``torch.autograd.grad(is_grads_batched=True)``.

    The kernels do not know them, and the dispatcher makes up for it only where one tensor is
    returned.
    """
    return not torch.compiler.is_compiling() and any(
        torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads
    )


def with_stride(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``grad`` laid out with ``stride``: masks are in memory order, so layouts must agree."""
    if grad.stride() == stride:
        return grad
    return grad.new_empty_strided(grad.shape, stride).copy_(grad)


def masked_grad(grad_y: Tensor, mask: Tensor) -> Tensor:
    """grad_y where the mask is set, else 0; differentiable where a graph is asked for."""
    if torch.is_grad_enabled():
        return MaskedGrad.apply(grad_y, mask)
    return _masked(grad_y, mask)


def _masked(grad_y: Tensor, mask: Tensor) -> Tensor:
    # By the mask that was saved: the backend may have changed since.
    if mask.dtype == torch.bool:
        return fake_quantize_backward_ref(grad_y, mask)
    return torch.ops.divqat.fake_quantize_backward(grad_y, mask)


class MaskedGrad(torch.autograd.Function):
    """grad_x = grad_y where the mask is set, else 0.

    It is linear in grad_y, so its own derivative is itself: double backward.
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
