"""One choice for each of several items, with the least cost within a total size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 20_000  # partial choices that are kept; below it the result is exact


def cheapest(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int
) -> list[int]:
    """Choose one option per item: the multiple-choice knapsack problem, by dynamic programming over
    the partial choices that no other one beats in both size and cost (Kellerer, Pferschy and
    Pisinger, "Knapsack Problems", 2004, ch. 11).

    The result is optimal, unless more than ``MOST`` partial choices remain after an item: then they
    are thinned to ``MOST``, evenly by rank, with the smallest and the cheapest among them. Of equal
    costs the smaller size wins.

    Args:
        sizes, costs: for each item, those of its options; a cost may be negative.
        capacity: the largest total size.

    Returns:
        The index of each item's option.

    Raises:
        ValueError: even the smallest options exceed ``capacity``.
    """
    smallest = [min(options) for options in sizes]
    if sum(smallest) > capacity:
        raise ValueError(f"capacity: wanted at least {sum(smallest)}, got {capacity}")
    total, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each item: parents and options
    for i, (size, price) in enumerate(zip(sizes, costs, strict=True)):
        room = capacity - sum(smallest[i + 1 :])
        totals = (total[:, None] + np.asarray(size, np.int64)).ravel()
        prices = (cost[:, None] + np.asarray(price, np.float64)).ravel()
        order = np.lexsort((prices, totals))
        order = order[totals[order] <= room]
        # Sorted by size, one is worth keeping if it costs less than all before it.
        before = np.minimum.accumulate(np.append(np.inf, prices[order][:-1]))
        order = order[prices[order] < before]
        if len(order) > MOST:
            order = order[np.linspace(0, len(order) - 1, MOST).round().astype(np.int64)]
        total, cost = totals[order], prices[order]
        steps.append((order // len(size), order % len(size)))
    chosen, at = [], len(total) - 1  # the cheapest
    for parents, options in reversed(steps):
        chosen.append(int(options[at]))
        at = int(parents[at])
    return chosen[::-1]
