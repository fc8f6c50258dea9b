"""Metrics of a victim and its clone. Shares are fractions in [0, 1], never percent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from divqat._util.progress import progress
from divqat.data.batches import batches, to_float
from divqat.data.sets import LabeledImages
from divqat.victim import Victim
from divqat.victim.runners import logits_function

HISTOGRAM_BINS = 20


def predict(model: Any, images: Tensor | LabeledImages, *, batch_size: int = 256) -> Tensor:
    """The logits of a model for uint8 images.

    Args:
        model: an ``nn.Module`` in eval mode, an ONNX path or session, or a function from float
            images to logits; see :class:`divqat.victim.Victim`.
        images: uint8 [N, C, H, W], or a set, which is read batch by batch.
        batch_size: images per forward pass.

    Returns:
        float32 [N, num_classes] on the CPU.

    Raises:
        FloatingPointError: a logit is NaN or Inf.
        TypeError, ValueError: ``model`` is not a model, or a module in training mode; wrong or no
            images.
    """
    shape = [*images.shape] if isinstance(images, Tensor) else [len(images), *images.image_shape]
    if len(shape) != 4 or not shape[0]:
        raise ValueError(f"images: wanted [N, C, H, W] with N of at least 1, got {shape}")
    logits_of = logits_function(model)
    chunks: Iterator[Tensor] = (
        map(to_float, images.split(batch_size))
        if isinstance(images, Tensor)
        else (floats for floats, _ in batches(images, batch_size))
    )
    total = -(-shape[0] // batch_size)
    return torch.cat([logits_of(chunk) for chunk in progress(chunks, "predict", total=total)])


def softmax(logits: Tensor) -> Tensor:  # [N, num_classes] -> float32 [N, num_classes]
    """Probabilities from logits."""
    return logits.float().softmax(1)


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of rows of ``outputs`` (logits or probabilities [N, num_classes]) whose largest entry
    is at the index in ``labels`` (int64 [N]).

    Raises:
        ValueError: other shapes, different lengths, or no rows.
    """
    _check_lengths(outputs, labels)
    return (outputs.argmax(1) == labels).double().mean().item()


def fidelity(a: Tensor, b: Tensor) -> float:
    """Share of rows of two outputs [N, num_classes] with the same top-1 class."""
    return accuracy(a, b.argmax(1))


def chance(labels: Tensor) -> float:
    """Accuracy of always predicting the most frequent class of ``labels`` (int64 [N])."""
    return labels.bincount().max().item() / len(labels)


def mean_top_probability(probs: Tensor) -> float:
    """Mean largest probability of ``probs`` [N, num_classes]."""
    return probs.max(1).values.double().mean().item()


def entropy(probs: Tensor) -> float:
    """Mean entropy of the rows of ``probs`` [N, num_classes], in nats; 0 log 0 = 0."""
    return torch.special.entr(probs.double()).sum(1).mean().item()


def top_probability_histogram(probs: Tensor) -> list[int]:
    """Number of rows of ``probs`` with their largest probability in each 20th of [0, 1]."""
    top = probs.max(1).values.cpu().double()
    counts = torch.histogram(top.clamp(0, 1), HISTOGRAM_BINS, range=(0.0, 1.0)).hist
    return [int(count) for count in counts]


def are_distributions(answers: Tensor, *, tolerance: float = 1e-4) -> bool:
    """Whether every row of ``answers`` [N, num_classes] is non-negative and sums to 1."""
    return bool((answers >= 0).all() and ((answers.sum(1) - 1).abs() <= tolerance).all())


def is_deterministic(victim: Victim, images: Tensor) -> bool:
    """Whether ``victim`` gives uint8 ``images`` the same answers twice; costs two queries per
    image."""
    return torch.equal(victim(to_float(images)), victim(to_float(images)))


def _check_lengths(outputs: Tensor, labels: Tensor) -> None:
    if outputs.dim() != 2 or labels.dim() != 1 or len(outputs) != len(labels) or not len(labels):
        raise ValueError(
            "wanted outputs [N, num_classes] and labels [N] with N of at least 1, "
            f"got {list(outputs.shape)} and {list(labels.shape)}"
        )
