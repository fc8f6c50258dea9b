"""Seeds derived from a seed."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one purpose: its random numbers do not depend on those drawn for others."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # int64
