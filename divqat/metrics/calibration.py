"""Whether a model is as often right as it is sure."""

from __future__ import annotations

import torch
from torch import Tensor

from divqat.data.sets import check_labels
from divqat.metrics.accuracy import are_distributions


def expected_calibration_error(probs: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """How far confidence and accuracy are apart on average.

    With B_m the images whose largest probability lies in ((m - 1) / M, m / M], m = 1 ... M,

        ECE = Σ_m |B_m| / n · |acc(B_m) - conf(B_m)|,

    acc the share of B_m that is classified right and conf its mean largest probability. A value on
    the border of two bins is in the lower one; an empty bin adds nothing; of equal probabilities
    the class with the lower index counts as the answer.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
    section 2, with the 15 bins of its experiments.

    Args:
        probs: [N, num_classes], float32 or float64, N at least 1; of logits take
            :func:`divqat.metrics.softmax`.
        labels: int64 [N].
        bins: M.

    Returns:
        A fraction in [0, 1], computed in float64.

    Raises:
        TypeError: labels of another dtype.
        ValueError: ``probs`` is no matrix of distributions (logits, NaN), the labels do not belong
            to it, or ``bins`` is below 1.
    """
    if probs.dim() != 2 or not len(probs) or not are_distributions(probs):
        raise ValueError(
            "probs: wanted [N, num_classes] with N of at least 1, rows not negative with sum 1, "
            f"got {list(probs.shape)}, row sums {_span(probs)}; softmax makes them of logits"
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
