"""White-box adversarial examples: small changes of images that make a model wrong.

The attacker knows the model and follows its gradient. Images are in [-1, 1], like the inputs of all
models here (:func:`divqat.data.to_float`); distances ε and α are fractions of the range of a pixel,
as in the literature: 8/255 is 8 of 255 grey levels, and twice as much in [-1, 1].

The accuracy under these two attacks is an upper bound of that under a stronger attacker. A model
with a flat loss around the images can hide its gradients (gradient masking) and look more robust
than it is.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat.data.sets import check_labels
from divqat.victim.runners import check_eval, check_images

RANGE = 2.0  # of a pixel in [-1, 1]


def fgsm(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, *, batch_size: int = 256
) -> Tensor:
    """The fast gradient sign method: x' = x + ε sign(∇_x CE(f(x), y)), cut to [-1, 1].

    Source: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR
    2015, section 4.

    Args:
        model: from images to logits [N, num_classes], in eval mode, on any device. A fake-quantized
            model has straight-through gradients. Weights, their ``.grad`` and the mode do not
            change.
        images: float [N, C, H, W] in [-1, 1].
        labels: int64 [N], the true classes.
        epsilon: 0 to 1, as a fraction of the range of a pixel.
        batch_size: images per forward pass.

    Returns:
        New images like ``images``, on the CPU.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or range, or the model is in
            training mode or not differentiable in its images.
        FloatingPointError: NaN or Inf in the gradient.
    """
    _check(model, images, labels, epsilon, batch_size)
    return _ascend(model, images, images, labels, epsilon, epsilon, 1, batch_size)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    alpha: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Projected gradient descent in the L∞ ball of radius ε around each image.

    Start from a point drawn uniformly from the ball, then ``steps`` times

        x ← Π(x + α sign(∇_x CE(f(x), y))),

    with Π the projection to the ball and to [-1, 1]; the last point is the result.

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018, section 2.1, with one random start of section 3. Steps and α
    are not the paper's: ten steps of 2.5 ε / 10 reach the border of the ball from every start.

    Args:
        model, images, labels, epsilon, batch_size: see :func:`fgsm`.
        steps: at least 1.
        alpha: above 0, as a fraction of the range of a pixel; None: 2.5 ε / steps.
        seed: of the random start, which does not depend on ``batch_size``.

    Returns:
        New images like ``images``, on the CPU.

    Raises:
        See :func:`fgsm`.
    """
    _check(model, images, labels, epsilon, batch_size)
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha: wanted above 0, got {alpha}")
    alpha = 2.5 * epsilon / steps if alpha is None else alpha
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator, dtype=images.dtype)
    starts = images.cpu() + epsilon * RANGE * (2 * noise - 1)
    return _ascend(model, images, starts, labels, epsilon, alpha, steps, batch_size)


def _ascend(
    model: nn.Module,
    images: Tensor,
    starts: Tensor,
    labels: Tensor,
    epsilon: float,
    alpha: float,
    steps: int,
    batch_size: int,
) -> Tensor:
    """Take ``steps`` ascent steps from ``starts``, which are projected like every step."""
    device = next(chain(model.parameters(), model.buffers()), images).device
    parts = []
    for batch in zip(*(x.split(batch_size) for x in (images, starts, labels)), strict=True):
        center, x, goal = (part.detach().to(device) for part in batch)
        low = (center - RANGE * epsilon).clamp(min=-1)
        high = (center + RANGE * epsilon).clamp(max=1)
        x = x.clamp(low, high)
        for _ in range(steps):
            x = (x + RANGE * alpha * _gradient_sign(model, x, goal)).clamp(low, high)
        parts.append(x.cpu())
    return torch.cat(parts)


def _gradient_sign(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """sign(∇_x CE(f(x), y)), entries -1, 0 or 1."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), labels, reduction="sum")
    gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError(f"model: wanted a gradient at the images, {type(model).__name__} has none")
    if not gradient.isfinite().all():
        raise FloatingPointError("model: NaN or Inf in the gradient at the images")
    return gradient.sign()


def _check(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, batch_size: int
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    check_eval(model)
    check_images(images)
    if images.abs().max() > 1:
        raise ValueError(
            f"images: wanted floats in [-1, 1], got {images.min():g} to {images.max():g}"
        )
    check_labels(labels, len(images))
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon: wanted 0 to 1, a fraction of a pixel's range, got {epsilon}")
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
