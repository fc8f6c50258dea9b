"""Metrics of models: accuracy and agreement, calibration, adversarial robustness."""

from divqat.metrics.accuracy import (
    HISTOGRAM_BINS,
    accuracy,
    are_distributions,
    chance,
    entropy,
    fidelity,
    is_deterministic,
    mean_top_probability,
    predict,
    softmax,
    top_probability_histogram,
)
from divqat.metrics.adversarial import fgsm, pgd
from divqat.metrics.calibration import expected_calibration_error
from divqat.metrics.confidence import Confidence

__all__ = [
    "HISTOGRAM_BINS",
    "Confidence",
    "accuracy",
    "are_distributions",
    "chance",
    "entropy",
    "expected_calibration_error",
    "fgsm",
    "fidelity",
    "is_deterministic",
    "mean_top_probability",
    "pgd",
    "predict",
    "softmax",
    "top_probability_histogram",
]
