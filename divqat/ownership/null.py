"""How often a suspect agrees with a decoy, against decoys of other keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from divqat.nn.decoy import keyed_rows

LOOKS = (50, 100, 200, 500)  # numbers of queries after which the test may stop
REDRAWS = 9_999  # other keys
CHUNK = 2**22  # scores of decoys at a time, 32 MiB
DIGITS = 9  # equal agreements must stay equal, in whatever order they were summed


def other_keys(nonce: str, count: int) -> list[bytes]:
    """Keys of decoys that nobody used, from the judge's nonce."""
    return [hashlib.sha256(f"{nonce} other key {i}".encode()).digest() for i in range(count)]


def redrawn_rows(nonce: str, num_classes: int, count: int = REDRAWS) -> Tensor:
    """W of :func:`other_keys`, float64 [count, num_classes, 4]."""
    return keyed_rows(other_keys(nonce, count), num_classes)


def decoy_classes(
    components: Tensor,  # float64 [Q, 4], z(x) of the queries
    rows: Tensor,  # float64 [K, num_classes, 4], W of each key
) -> Tensor:  # int64 [K, Q]
    """The class that each key's decoy gives to each query."""
    size = max(1, CHUNK // max(1, rows.shape[1] * len(components)))
    return torch.cat([(part @ components.T).argmax(1) for part in rows.split(size)])


def excess_agreement(
    answers: Tensor,  # float64 [Q, num_classes]
    classes: Tensor,  # int64 [K, Q]
) -> Tensor:  # float64 [K]
    """T(W): the mean answer for the decoy's class, above what the same answers in another order of
    the queries would have on average.

    So a suspect that answers all queries alike has T = 0 under every key. With one-hot answers the
    mean is the share of queries for which suspect and decoy have the same class.
    """
    centred = answers - answers.mean(0)
    queries = torch.arange(len(answers))
    size = max(1, CHUNK // len(answers))
    means = [centred[queries, part].mean(1) for part in classes.split(size)]
    return torch.cat(means).round(decimals=DIGITS)


def p_values(
    claimed: Tensor,  # [K]
    null: Tensor,  # [m]
) -> Tensor:  # float64 [K]
    """p = (1 + #{T(W_i) >= T(W)}) / (m + 1) of each claimed T(W): if W is independent of the
    suspect and drawn as all W_i are, P(p <= a) <= a for every a."""
    below = torch.searchsorted(null.sort().values, claimed)
    return (1 + len(null) - below).double() / (len(null) + 1)


def corrected(looks: Sequence[Tensor]) -> Tensor:
    """One p-value from those of the looks taken, by Bonferroni: the number of all looks times the
    least. Looks that were not taken, as the test had stopped, can only lower it."""
    return (len(LOOKS) * torch.stack(list(looks)).amin(0)).clamp(max=1)
