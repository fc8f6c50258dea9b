"""Set the strength of defenses to the same L1 distance, so that they can be compared."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import TypeVar

from torch import Tensor

from divqat.defenses.defense import Defense

D = TypeVar("D", bound=Defense)

LARGEST = 2.0**20  # stands for infinity in settings without an upper bound
HALVINGS = 60  # exhausts the precision of float64


def l1_distance(a: Tensor, b: Tensor) -> float:
    """Mean over the rows of |a - b|_1 of two answers [N, num_classes]: 0 to 2.

    Raises:
        ValueError: different shapes, or no rows.
    """
    if a.shape != b.shape or a.dim() != 2 or not len(a):
        raise ValueError(
            "a, b: wanted the same [N, num_classes] with N of at least 1, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    return (a.double() - b.double()).abs().sum(1).mean().item()


def calibrated(
    defense: D, probs: Tensor, images: Tensor, l1: float, *, tolerance: float = 1e-3
) -> D:
    """A copy of ``defense`` whose answers have a mean L1 distance of ``l1`` from the clean ones.

    Its ``strength`` setting is found by bisection, as the distance grows with it; all other
    settings stay. Call ``fit`` first, if the defense needs it. A few thousand answers are enough;
    every step of the search defends all of them.

    Args:
        defense: any with a ``strength``.
        probs: clean answers, float32 [N, num_classes], rows of sum 1.
        images: the queries, float32 [N, C, H, W] in [-1, 1].
        l1: wanted mean of |y' - y|_1.
        tolerance: largest deviation of the mean from ``l1``.

    Raises:
        ValueError: the defense has no strength, or cannot reach ``l1`` within ``tolerance``; the
            message gives the range that it reaches.
    """
    name = defense.strength
    if name is None:
        raise ValueError(f"defense: wanted one whose strength can be set, got {defense}")

    def distance(value: float) -> float:
        return l1_distance(_with(defense, name, value)(probs, images), probs)

    (setting,) = (field for field in fields(defense) if field.name == name)
    largest = setting.metadata["bounds"].get("at most", LARGEST)
    low, high = defense.neutral, min(defense.neutral + 1, largest)
    while (reached := distance(high)) < l1 and high < largest:
        low, high = high, min(2 * high, largest)
    if not 0 <= l1 <= reached + tolerance:
        raise ValueError(
            f"l1: wanted 0 to {reached:.4g}, which {type(defense).__name__} reaches with "
            f"{name}={high:g}, got {l1:g}"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        got = distance(middle)
        if abs(got - l1) <= tolerance:
            return _with(defense, name, middle)
        low, high = (middle, high) if got < l1 else (low, middle)
    raise ValueError(
        f"l1: wanted a distance that {type(defense).__name__} reaches; at {name}={high:g} it jumps "
        f"from {distance(low):.4g} to {distance(high):.4g}, got {l1:g}"
    )


def _with(defense: D, name: str, value: float) -> D:
    """A copy with another setting. Unlike ``dataclasses.replace`` it keeps fitted networks, and it
    does not share remembered queries."""
    changed = copy.deepcopy(defense)
    object.__setattr__(changed, name, value)
    return changed
