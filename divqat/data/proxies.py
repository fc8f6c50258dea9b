"""Proxies of what a thief may ask about: images near the training set, but outside it.

An attacker's queries are not known when a model is trained. A thief's images have shapes, edges and
textures, and are not of the task: so are training images that are shuffled, turned or bent, and
drawings, noise and photos. (To train on outliers that stand for unknown ones: Hendrycks, Mazeika
and Dietterich, "Deep anomaly detection with outlier exposure", ICLR 2019, arXiv 1812.04606, there
to detect them.) The clip art that this package attacks with is not among them, or a defense
would be measured on what it has learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from divqat._util.errors import unknown_name
from divqat.data.distortions import (
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

POOL, POOL_BYTES = 10_000, 2**28  # images of a kind that are read from files, at most
DRAWINGS, DRAWN_BYTES = 4096, 2**26  # that are drawn, at most
AT_ONCE = 2**17  # bytes drawn at once; that takes some hundred times as much memory

# name → what makes one image of each that it is given
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
}
DRAWN = ("glyphs", "leaves", "noise")  # from nothing
READ = ("photos", "folder")
NAMES = (*MADE, "mixed", *READ)
# Those that a defense is trained on if nothing is said.
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
    """The images of ``glyphs``, ``leaves``, ``noise``, ``photos`` and ``folder``, as far as they
    are among ``names``: what is not made from training images is made once.

    Of each at most 4096 drawings, 64 MiB, drawn on the CPU and so the same everywhere, or 10,000
    pictures, 256 MiB, read as :func:`divqat.data.transfer_set` does.

    Args:
        names: of :data:`NAMES`. image_shape: (C, H, W). device: where they are kept.
        folder: the pictures of ``folder``. seed: which drawings, patches, pictures and variants.

    Returns:
        uint8 [P, C, H, W] by name.

    Raises:
        DataNotFound: the pictures are not on this machine. ImportError: Pillow or scikit-learn is
            missing.
    """
    channels, height, width = image_shape
    size = {"channels": channels, "image_size": (height, width), "seed": seed}
    limit = max(1, min(POOL, POOL_BYTES // (channels * height * width)))
    roots = {name: folder if name == "folder" else None for name in names if name in READ}
    read = {
        name: transfer_set(name, limit=limit, data_root=root, **size)  # type: ignore[arg-type]
        for name, root in roots.items()
    }
    drawn = {name: _draw(name, image_shape, seed) for name in names if name in DRAWN}
    return {name: pool.to(device) for name, pool in {**drawn, **read}.items()}


def _draw(name: str, image_shape: tuple[int, int, int], seed: int) -> Tensor:
    """A pool of ``DRAWN``, uint8 [P, C, H, W] on the CPU."""
    generator, size = Generator().manual_seed(seed), math.prod(image_shape)
    paper = torch.empty(1, *image_shape, dtype=torch.uint8)
    total, at_once = max(1, min(DRAWINGS, DRAWN_BYTES // size)), max(1, AT_ONCE // size)
    counts = [min(at_once, total - done) for done in range(0, total, at_once)]
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
    """Proxies in random order, of each name as many as of any other.

    Where ``count`` is no multiple of the names' number, chance leaves some out. Nothing here
    waits for a GPU.

    Args:
        names: of :data:`NAMES`.
        images: what they are made from, each as often as chance has it.
        generator: on the device of ``images``; with them it alone determines the result.
        count: how many; 0 or more.
        labels: of ``images``, for ``mixed``.
        pools: of :func:`proxy_pools`, for ``photos`` and ``folder``; drawn kinds without one are
            drawn anew.

    Raises:
        ValueError: an unknown name, or no pool for one that needs it.
        TypeError: ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if count == 0:
        return images[:0]
    each = -(-count // len(names))
    made = []
    for name in names:
        if pools is not None and name in pools:
            made.append(pools[name][choose(images, pools[name], each, generator)])
            continue
        rows = choose(images, images, each, generator)
        if name in MADE:
            made.append(MADE[name](images[rows], generator))
        elif name == "mixed":
            made.append(mixed(images, labels, rows, generator))
        elif name in READ:
            raise ValueError(f"pools: wanted {name}, see proxy_pools, got {list(pools or ())}")
        else:
            raise unknown_name("proxy", name, NAMES)
    order = rand(images, each * len(names), generator=generator).argsort()
    return torch.cat(made)[order[:count]]
