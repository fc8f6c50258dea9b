"""How sure a model is of its answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divqat.metrics.accuracy import entropy, mean_top_probability, top_probability_histogram


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How sure the deployed victim is of its answers on one set of images."""

    top_probability: float  # mean
    entropy: float  # mean, nats
    histogram: list[int]  # images per 20th of [0, 1] that the top probability lies in

    @classmethod
    def of(cls, probs: Tensor) -> Confidence:
        """From probabilities [N, num_classes]."""
        return cls(
            top_probability=mean_top_probability(probs),
            entropy=entropy(probs),
            histogram=top_probability_histogram(probs),
        )
