"""Seeds made of a seed."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one purpose: its stream does not depend on how much others have drawn."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # int64
