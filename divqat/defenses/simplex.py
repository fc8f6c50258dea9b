"""Distribution of mass over the classes of an answer."""

from __future__ import annotations

from torch import Tensor


def fill(
    mass: Tensor,  # [N, 1]
    room: Tensor,  # [N, K], non-negative
) -> Tensor:  # [N, K]
    """The mass that each class gets if the first is filled up first, then the second, and so on.

    Rows sum to ``mass``, or to the sum of ``room`` if that is less; a negative mass counts as 0.
    """
    return (mass - (room.cumsum(1) - room)).clamp(min=0).minimum(room)
