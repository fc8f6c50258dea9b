"""Batches of a fixed size for files that take no other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from divqat._util.bounds import MAX_IMAGES


def in_batches(
    run: Callable[[Tensor], Tensor],
    images: Tensor,  # [N, …]
    fixed: int | None,
    model: str,
) -> Tensor:  # [N, num_classes]
    """``run`` of all images; of ``fixed`` at a time if that is not None.

    The last batch is padded with its last image, and the extra answers are dropped.

    Raises:
        ValueError: ``fixed`` images are more than a file should make one hold; ``model`` names
            what wants them.
    """
    if fixed is not None and fixed * images[0].nbytes > MAX_IMAGES:
        raise ValueError(f"model: {model} wants {fixed} images at a time")
    parts = []
    for part in images.split(fixed or len(images)):
        missing = (fixed or len(part)) - len(part)
        full = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
        parts.append(run(full)[: len(part)])
    return torch.cat(parts)
