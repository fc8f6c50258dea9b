"""Calibration and adversarial robustness of a victim, which its training may have changed."""

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

    Adversarial images follow the gradients of the subject's module (a fake-quantized one has
    straight-through gradients). Their accuracy is that of the deployed model, which rounds them to
    the grid of its input. FGSM and PGD alone measure white-box accuracy: see
    :mod:`divqat.metrics.adversarial` for models that hide their gradients.

    Args:
        deployed: the victim.
        epsilons: how far FGSM and PGD may move a pixel, as fractions of its range.
        images: number of test images that they move: the first ones, all if there are fewer.
        seed: of PGD's random starts.
    """
    probs, test = softmax(deployed.test_logits), deployed.test
    model, attacked = deployed.subject.gradients, test.subset(slice(images))
    clean, labels = to_float(attacked.images), attacked.labels

    def correct(adversarial: Tensor) -> float:
        # Labels come from logits, which may differ where probabilities tie.
        return accuracy(Victim(deployed.subject.model, answer="label")(adversarial), labels)

    start = derived_seed(seed, "pgd")
    adversarial = [] if model is None else [
        {
            "epsilon": epsilon,
            "images": len(attacked),
            "fgsm": correct(fgsm(model, clean, labels, epsilon)),
            "pgd": correct(pgd(model, clean, labels, epsilon, seed=start)),
        }
        for epsilon in epsilons
    ]  # fmt: skip
    return {
        "accuracy": accuracy(deployed.test_logits, test.labels),
        "ece": expected_calibration_error(probs, test.labels),
        "top_probability": mean_top_probability(probs),
        "adversarial": adversarial,
    }
