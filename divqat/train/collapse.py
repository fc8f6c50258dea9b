"""Detection of a training that collapsed, that is, lost what it had learned.

A larger batch allows a higher learning rate as long as gradient noise limits the rate. Once
BatchNorm is frozen, curvature limits it: freezing raises the curvature, and larger batches do not
lower it. Nesterov's method leaves a minimum whose curvature exceeds (2 + 2β) / ((1 + 2β) lr), β the
momentum (Cohen et al. 2021, ICLR, "Gradient Descent on Neural Networks Typically Occurs at the Edge
of Stability"). :meth:`TrainConfig.learning_rate` is therefore scaled up only until BatchNorm
freezes. Whether an unscaled rate is too high cannot be known in advance; it is reported afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def collapse_warning(
    rows: Sequence[dict[str, Any]], result: float, frozen_from: float, never: int
) -> str | None:
    """A warning if a model ends with less than half of its best validation accuracy, else None.

    No successful training ends like this, whatever its data and defense. A collapsed one has finite
    numbers and would otherwise look successful.

    Args:
        rows: the rows of ``metrics.csv``, at least one.
        result: validation accuracy of the resulting model; a budget may choose an earlier one.
        frozen_from: the first epoch with frozen BatchNorm.
        never: an epoch that this training does not reach.
    """
    best = max(rows, key=lambda row: row["validation_accuracy"])
    if 2 * result >= best["validation_accuracy"]:
        return None
    text, advice = "", "a smaller lr, or grad_clip"
    if best["epoch"] < frozen_from <= rows[-1]["epoch"]:
        text = f"; BatchNorm froze in epoch {frozen_from}, which makes the loss steeper"
        advice = f"a smaller lr, or freeze_batchnorm_epoch = {never} (never)"
    return (
        f"validation accuracy fell from {best['validation_accuracy']:.2%} in epoch {best['epoch']} "
        f"to {result:.2%}{text}: try {advice}"
    )
