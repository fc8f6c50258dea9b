"""Whether a training lost what it had learned.

A large batch may have a higher learning rate where noise is what limits it. With frozen BatchNorm
it is curvature, which rises with the freezing and does not fall as the batch grows: Nesterov's
method leaves a minimum whose curvature exceeds (2 + 2β) / ((1 + 2β) lr), β the momentum (Cohen et
al. 2021, ICLR, "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability"). So
:meth:`TrainConfig.learning_rate` is scaled up only until then. One that is too high without being
scaled cannot be known beforehand: it is told afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def collapse(
    rows: Sequence[dict[str, Any]], result: float, frozen_from: float, never: int
) -> str | None:
    """What to tell of a model that ends with less than half of its best validation accuracy.

    No training that went well ends so, whatever its data and its defense; one that did is finite
    and looks finished.

    Args:
        rows: those of ``metrics.csv``, at least one.
        result: the model's validation accuracy; a budget may have chosen an earlier one.
        frozen_from: the epoch from which BatchNorm was frozen. never: one that is not reached.
    """
    best = max(rows, key=lambda row: row["validation_accuracy"])
    if 2 * result >= best["validation_accuracy"]:
        return None
    text, advice = "", "a smaller lr, or grad_clip"
    if best["epoch"] < frozen_from <= rows[-1]["epoch"]:
        text = f"; BatchNorm froze with epoch {frozen_from}, and the loss is steeper since"
        advice = f"a smaller lr, or freeze_batchnorm_epoch = {never}, which is never"
    return (
        f"validation accuracy fell from {best['validation_accuracy']:.2%} in epoch {best['epoch']} "
        f"to {result:.2%}{text}: try {advice}"
    )
