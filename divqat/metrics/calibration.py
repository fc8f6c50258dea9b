"""Calibration: whether confidence matches accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from divqat.data.sets import check_labels
from divqat.metrics.accuracy import are_distributions


def expected_calibration_error(probs: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """The mean gap between confidence and accuracy (ECE).

    With B_m the images whose largest probability lies in ((m - 1) / M, m / M], m = 1 ... M,

        ECE = Σ_m |B_m| / n · |acc(B_m) - conf(B_m)|,

    with acc the accuracy on B_m and conf its mean largest probability. A value on the border of two
    bins belongs to the lower one; empty bins add nothing; ties go to the class with the lower
    index.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
    section 2, with the 15 bins of its experiments.

    Args:
        probs: [N, num_classes], float32 or float64, N at least 1; convert logits with
            :func:`divqat.metrics.softmax`.
        labels: int64 [N].
        bins: M.

    Returns:
        A fraction in [0, 1], computed in float64.

    Raises:
        TypeError: labels of another dtype.
        ValueError: the rows of ``probs`` are not distributions (logits, NaN), the labels do not
            match, or ``bins`` is below 1.
    """
    if probs.dim() != 2 or not len(probs) or not are_distributions(probs):
        raise ValueError(
            "probs: wanted [N, num_classes] with N of at least 1, non-negative rows with sum 1, "
            f"got {list(probs.shape)}, row sums {_span(probs)}; convert logits with softmax"
        )
    check_labels(labels, len(probs))
    if labels.max() >= probs.shape[1]:
        raise ValueError(f"labels: wanted below {probs.shape[1]}, got {int(labels.max())}")
    if bins < 1:
        raise ValueError(f"bins: wanted at least 1, got {bins}")
    confidence, answer = probs.double().max(1)
    right = (answer == labels).double()
    borders = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=probs.device)[1:-1]
    gaps = torch.zeros(bins, dtype=torch.float64, device=probs.device)
    # |B| / n |acc - conf| is |Σ (right - confidence)| / n over the images of a bin
    gaps.index_add_(0, torch.bucketize(confidence, borders), right - confidence)
    return gaps.abs().sum().item() / len(probs)


def _span(probs: Tensor) -> str:
    if probs.dim() != 2 or not probs.numel():
        return "none"
    sums = probs.double().sum(1)
    return f"{sums.min().item():g} to {sums.max().item():g}"
