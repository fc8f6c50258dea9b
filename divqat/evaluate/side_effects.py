"""How calibrated and how robust a victim is: what training for another aim may have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from divqat._util.seeds import derived_seed
from divqat.data import to_float
from divqat.evaluate.subject import Deployed
from divqat.metrics import (
    accuracy,
    expected_calibration_error,
    fgsm,
    mean_top_probability,
    pgd,
    softmax,
)
from divqat.victim import Victim


def measure(
    deployed: Deployed, epsilons: Sequence[float], images: int, seed: int
) -> dict[str, Any]:
    """The measured fields of :class:`divqat.evaluate.results.SideEffects`.

    Adversarial images are made with the gradients of the subject's module, which for a quantized
    one pass straight through its rounding, and given to the model as it is deployed, which rounds
    them to the grid of its input itself: what is reported is the deployed model's accuracy.
    White-box accuracy is measured by FGSM and PGD only: see :mod:`divqat.metrics.adversarial` for
    what a model that hides its gradients does to it.

    Args:
        deployed: the victim.
        epsilons: how far FGSM and PGD may move a pixel, in parts of its range.
        images: how many test images they move: the first ones, all if there are fewer.
        seed: of PGD's random starts.
    """
    probs, test = softmax(deployed.test_logits), deployed.test
    model, some = deployed.subject.gradients, test.subset(slice(images))
    clean = to_float(some.images)

    def correct(moved: Tensor) -> float:
        # its labels are the largest logits: probabilities may tie where logits do not
        return accuracy(Victim(deployed.subject.model, answer="label")(moved), some.labels)

    start = derived_seed(seed, "pgd")
    adversarial = [] if model is None else [
        {
            "epsilon": epsilon,
            "images": len(some),
            "fgsm": correct(fgsm(model, clean, some.labels, epsilon)),
            "pgd": correct(pgd(model, clean, some.labels, epsilon, seed=start)),
        }
        for epsilon in epsilons
    ]  # fmt: skip
    return {
        "accuracy": accuracy(deployed.test_logits, test.labels),
        "ece": expected_calibration_error(probs, test.labels),
        "top_probability": mean_top_probability(probs),
        "adversarial": adversarial,
    }
