"""Metrics, audits and the report. See :mod:`divqat.evaluate.result` for the layout of results."""

from divqat.evaluate.adversarial import fgsm, pgd
from divqat.evaluate.calibration import expected_calibration_error
from divqat.evaluate.metrics import (
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
from divqat.evaluate.report import write_report
from divqat.evaluate.result import AttackResult, Confidence, Result, VictimResult
from divqat.evaluate.tables import results_table

__all__ = [
    "AttackResult",
    "Confidence",
    "Result",
    "VictimResult",
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
    "results_table",
    "softmax",
    "top_probability_histogram",
    "write_report",
]
