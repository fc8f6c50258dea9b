"""Proxies of an attacker's queries: images near the training set, but outside it.

An attacker's queries are not known when a model is trained. They have shapes, edges and textures,
but do not belong to the task. The same holds for training images that are shuffled, rotated or
warped, and for drawings, noise and photos. (Outlier exposure, training on outliers that represent
unknown ones, is due to Hendrycks, Mazeika and Dietterich, "Deep anomaly detection with outlier
exposure", ICLR 2019, arXiv 1812.04606, there for detection.) The clip art of this package's attacks
is not among the proxies; otherwise a defense would be measured on its own training data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from divqat._util.errors import unknown_name
from divqat.data.compositions import composed
from divqat.data.distortions import (
    augmented,
    choose,
    collage,
    edges,
    inverted,
    mixed,
    noise,
    rand,
    rotated,
    shuffled,
    thresholded,
    warped,
    zoomed,
)
from divqat.data.glyphs import glyphs
from divqat.data.leaves import leaves
from divqat.data.transfer import transfer_set

POOL, POOL_BYTES = 10_000, 2**28  # limits of a pool that is read from files
DRAWINGS, DRAWN_BYTES = 4096, 2**26  # limits of a pool of drawings
BATCH_BYTES = 2**17  # drawn at a time, with about a hundred times as much working memory

# name → function that makes one proxy of each given image
MADE: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "glyphs": glyphs,
    "noise": noise,
    "shuffled": shuffled,
    "rotated": rotated,
    "inverted": inverted,
    "warped": warped,
    "edges": edges,
    "thresholded": thresholded,
    "leaves": leaves,
    "zoomed": zoomed,
    "collage": collage,
    "augmented": augmented,
}
DRAWN = ("glyphs", "leaves", "noise")  # do not depend on the given images
PARTS = ("glyphs", "leaves")  # of ``composed``
READ = ("photos", "icons", "folder")
NAMES = (*MADE, "mixed", "composed", *READ)
# The default proxies of a defense.
PROXIES = (
    "glyphs", "leaves", "noise", "shuffled", "rotated", "inverted", "warped", "zoomed", "collage",
    "edges",
)  # fmt: skip


def proxy_pools(
    names: Sequence[str],
    image_shape: tuple[int, int, int],
    device: torch.device,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Pools of the proxies that do not depend on training images, which are made only once:
    ``glyphs``, ``leaves``, ``noise``, ``photos``, ``icons`` and ``folder``, as far as ``names``
    has them; the first two also for ``composed``.

    A pool has at most 4096 drawings (64 MiB), drawn on the CPU and thus the same on all devices, or
    10,000 pictures (256 MiB), read by :func:`divqat.data.transfer_set`.

    Args:
        names: from :data:`NAMES`.
        image_shape: (C, H, W).
        device: of the pools.
        folder: the pictures of ``folder``.
        seed: of the drawings, patches, pictures and variants.

    Returns:
        uint8 [P, C, H, W] by name.

    Raises:
        DataNotFound: the pictures are not on this machine.
        ImportError: Pillow or scikit-learn is missing.
    """
    channels, height, width = image_shape
    size = {"channels": channels, "image_size": (height, width), "seed": seed}
    limit = max(1, min(POOL, POOL_BYTES // (channels * height * width)))
    roots = {name: folder if name == "folder" else None for name in names if name in READ}
    read = {
        name: transfer_set(name, limit=limit, data_root=root, **size)  # type: ignore[arg-type]
        for name, root in roots.items()
    }
    used = {*names, *(PARTS if "composed" in names else ())}
    drawn = {name: _draw(name, image_shape, seed) for name in DRAWN if name in used}
    return {name: pool.to(device) for name, pool in {**drawn, **read}.items()}


def _draw(name: str, image_shape: tuple[int, int, int], seed: int) -> Tensor:
    """A pool of ``DRAWN``, uint8 [P, C, H, W] on the CPU."""
    generator, size = Generator().manual_seed(seed), math.prod(image_shape)
    paper = torch.empty(1, *image_shape, dtype=torch.uint8)
    total, batch = max(1, min(DRAWINGS, DRAWN_BYTES // size)), max(1, BATCH_BYTES // size)
    counts = [min(batch, total - done) for done in range(0, total, batch)]
    return torch.cat([MADE[name](paper.expand(n, -1, -1, -1), generator) for n in counts])


def proxy_batch(
    names: Sequence[str],
    images: Tensor,  # uint8 [N, C, H, W], N at least 1
    generator: Generator,
    count: int,
    *,
    labels: Tensor | None = None,  # int64 [N]
    pools: Mapping[str, Tensor] | None = None,
) -> Tensor:  # uint8 [count, C, H, W]
    """Proxies of all names in equal numbers, in random order. There is no host sync.

    If ``count`` is not a multiple of the number of names, the surplus is dropped at random.

    Args:
        names: from :data:`NAMES`.
        images: images from which proxies are made, drawn with replacement.
        generator: on the device of ``images``; the result depends only on it and the arguments.
        count: number of proxies, 0 or more.
        labels: of ``images``, for ``mixed``.
        pools: from :func:`proxy_pools`, for ``photos``, ``icons``, ``folder`` and ``composed``;
            drawings without a pool are drawn anew.

    Raises:
        ValueError: an unknown name, or no pool for one that needs it.
        TypeError: ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if count == 0:
        return images[:0]
    per_name = -(-count // len(names))
    proxies = []
    for name in names:
        if pools is not None and name in pools:
            proxies.append(pools[name][choose(images, pools[name], per_name, generator)])
            continue
        rows = choose(images, images, per_name, generator)
        if name in MADE:
            proxies.append(MADE[name](images[rows], generator))
        elif name == "mixed":
            proxies.append(mixed(images, labels, rows, generator))
        elif name == "composed":
            drawings, scenes = (_pool(part, pools) for part in PARTS)
            proxies.append(composed(images[rows], drawings, scenes, generator))
        elif name in READ:
            proxies.append(_pool(name, pools))
        else:
            raise unknown_name("proxy", name, NAMES)
    order = rand(images, per_name * len(names), generator=generator).argsort()
    return torch.cat(proxies)[order[:count]]


def _pool(name: str, pools: Mapping[str, Tensor] | None) -> Tensor:
    """The pool of ``name``, or ValueError."""
    if pools is None or name not in pools:
        raise ValueError(f"pools: wanted {name}, see proxy_pools, got {list(pools or ())}")
    return pools[name]
