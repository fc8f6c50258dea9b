"""Confidence of a model in its answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divqat.metrics.accuracy import entropy, mean_top_probability, top_probability_histogram


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Confidence of the released answers on one set of images."""

    top_probability: float  # mean
    entropy: float  # mean, nats
    histogram: list[int]  # number of images with the top probability in each 20th of [0, 1]

    @classmethod
    def of(cls, probs: Tensor) -> Confidence:
        """From probabilities [N, num_classes]."""
        return cls(
            top_probability=mean_top_probability(probs),
            entropy=entropy(probs),
            histogram=top_probability_histogram(probs),
        )
