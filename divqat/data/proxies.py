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
import torch.nn.functional as F
from torch import Generator, Tensor

from divqat.data.glyphs import glyphs
from divqat.data.leaves import leaves
from divqat.data.transfer import transfer_set
from divqat.errors import unknown_name

GRID = 4  # patches along an axis; of fewer, whole parts of a thing can be seen
COARSE = 4  # points along an axis, from which a smooth field is interpolated
REACH = 0.4  # farthest that a pixel is bent, in halves of the side
PASTED = 3  # images in a collage, on top of each other
POOL, POOL_BYTES = 10_000, 2**28  # images of a kind that are read from files, at most
DRAWINGS, DRAWN_BYTES = 4096, 2**26  # that are drawn, at most
AT_ONCE = 2**17  # bytes drawn at once; that takes some hundred times as much memory


def noise(images: Tensor, generator: Generator) -> Tensor:
    """White noise, or (every other image, at random) smooth noise, from dark to light."""
    m, channels, height, width = images.shape
    white = _rand(images, m, channels, height, width, generator=generator)
    smooth = _smooth(_rand(images, m, channels, COARSE, COARSE, generator=generator), images)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    smooth = (smooth - low) / (high - low).clamp(min=1e-6)
    is_white = _rand(images, m, 1, 1, 1, generator=generator) < 0.5
    return _to_bytes(255 * torch.where(is_white, white, smooth))


def shuffled(images: Tensor, generator: Generator) -> Tensor:
    """The 4 x 4 patches of each image in another order; what is left over at the right and lower
    edge stays."""
    m, channels, height, width = images.shape
    high, wide = height // GRID, width // GRID  # of a patch
    order = _rand(images, m, GRID * GRID, generator=generator).argsort(1)
    patches = (
        images[:, :, : GRID * high, : GRID * wide]
        .reshape(m, channels, GRID, high, GRID, wide)
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(1, 2)
    )  # [m, 16, C, high, wide]
    rows = torch.arange(m, device=images.device)[:, None]
    moved = patches[rows, order].view(m, GRID, GRID, channels, high, wide)
    out = images.clone()
    out[:, :, : GRID * high, : GRID * wide] = moved.permute(0, 3, 1, 4, 2, 5).reshape(
        m, channels, GRID * high, GRID * wide
    )
    return out


def rotated(images: Tensor, generator: Generator) -> Tensor:
    """Turned by 60° to 300°; what comes in at the corners is mirrored."""
    m, _, height, width = images.shape
    angle = math.radians(60) + math.radians(240) * _rand(images, m, generator=generator)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = height / width  # grid coordinates run from -1 to 1 along both axes
    theta = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(m, 2, 3)
    return _to_bytes(_sampled(images, _grid(images, theta)))


def inverted(images: Tensor, generator: Generator) -> Tensor:
    """Dark for light."""
    return 255 - images


def warped(images: Tensor, generator: Generator) -> Tensor:
    """Bent smoothly, each pixel by up to about a fifth of the side along each axis."""
    m = len(images)
    bend = 2 * _rand(images, m, 2, COARSE, COARSE, generator=generator) - 1
    identity = torch.eye(2, 3, device=images.device).expand(m, 2, 3)
    grid = _grid(images, identity) + REACH * _smooth(bend, images).permute(0, 2, 3, 1)
    return _to_bytes(_sampled(images, grid))


def zoomed(images: Tensor, generator: Generator) -> Tensor:
    """A thing that is small, 30 to 55 % of the side, or a part of one, 2 to 3.5 times as large;
    somewhere, mirrored along either axis or not. What comes in at the edge goes on outwards."""
    m = len(images)
    near = _rand(images, m, 1, generator=generator) < 0.5
    shrunk = 0.3 + 0.25 * _rand(images, m, 1, generator=generator)
    magnified = 2 + 1.5 * _rand(images, m, 1, generator=generator)
    step = 1 / torch.where(near, magnified, shrunk)  # in the image, per pixel of the result
    mirror = torch.where(_rand(images, m, 2, generator=generator) < 0.5, -1, 1)
    aside = 0.8 * (step - 1).abs() * (2 * _rand(images, m, 2, generator=generator) - 1)
    theta = torch.cat([(step * mirror).diag_embed(), aside[:, :, None]], dim=2)
    return _to_bytes(_sampled(images, _grid(images, theta), "border"))


def collage(images: Tensor, generator: Generator) -> Tensor:
    """Three images, 25 to 70 % of the side, turned, some inverted, on paper of one shade."""
    m, _, height, width = images.shape
    shade = 255 * _rand(images, m, 1, 1, 1, generator=generator)
    black = _rand(images, m, 1, 1, 1, generator=generator) < 0.5
    picture = torch.where(black, 0, shade).expand(images.shape)
    ratio = height / width
    for _ in range(PASTED):
        own = images[_choose(images, images, m, generator)].float()
        own = torch.where(_rand(images, m, 1, 1, 1, generator=generator) < 0.3, 255 - own, own)
        own = own * (0.4 + 0.6 * _rand(images, m, 1, 1, 1, generator=generator))
        angle = 2 * math.pi * _rand(images, m, generator=generator)
        step = 1 / (0.25 + 0.45 * _rand(images, m, generator=generator))
        x, y = (1.4 * _rand(images, 2, m, generator=generator) - 0.7).unbind()  # its center
        cos, sin = step * angle.cos(), step * angle.sin()
        rows = [cos, -sin * ratio, sin * ratio * y - cos * x]
        rows += [sin / ratio, cos, -sin / ratio * x - cos * y]
        grid = _grid(images, torch.stack(rows, dim=1).view(m, 2, 3))
        inside = grid.abs().amax(-1)[:, None] < 0.9  # without what only a border is
        picture = torch.where(inside, _sampled(own, grid), picture)
    return _to_bytes(picture)


def edges(images: Tensor, generator: Generator) -> Tensor:
    """How steep each channel is (Sobel), the steepest place of an image white."""
    # Differences: a kernel's numbers would be copied to the GPU, and the host would wait for it.
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    across, down = padded[..., 2:] - padded[..., :-2], padded[:, :, 2:] - padded[:, :, :-2]
    across = across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    steep = torch.stack([across, down]).norm(dim=0)
    return _to_bytes(255 * steep / steep.amax((1, 2, 3), keepdim=True).clamp(min=1e-6))


def thresholded(images: Tensor, generator: Generator) -> Tensor:
    """White where a channel is above its mean in the image, black elsewhere."""
    mean = images.float().mean((2, 3), keepdim=True)
    return (images > mean).to(torch.uint8) * 255


def mixed(
    images: Tensor,  # uint8 [N, C, H, W]
    labels: Tensor | None,  # int64 [N]
    rows: Tensor,  # int64 [M]
    generator: Generator,
) -> Tensor:  # uint8 [M, C, H, W]
    """``images[rows]``, each with 40 to 60 % of an image of another class (Zhang et al., "mixup:
    Beyond empirical risk minimization", ICLR 2018, §2, there over all shares). Without labels, of
    any image, and where all images are of one class, of the first."""
    liking = _rand(images, len(rows), len(images), generator=generator)
    if labels is not None:
        liking = liking.masked_fill(labels[rows, None] == labels, -1)
    share = 0.4 + 0.2 * _rand(images, len(rows), 1, 1, 1, generator=generator)
    others = images[liking.argmax(1)].float()
    return _to_bytes(torch.lerp(images[rows].float(), others, share))


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
            made.append(pools[name][_choose(images, pools[name], each, generator)])
            continue
        rows = _choose(images, images, each, generator)
        if name in MADE:
            made.append(MADE[name](images[rows], generator))
        elif name == "mixed":
            made.append(mixed(images, labels, rows, generator))
        elif name in READ:
            raise ValueError(f"pools: wanted {name}, see proxy_pools, got {list(pools or ())}")
        else:
            raise unknown_name("proxy", name, NAMES)
    order = _rand(images, each * len(names), generator=generator).argsort()
    return torch.cat(made)[order[:count]]


def _rand(like: Tensor, *shape: int, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device)


def _choose(like: Tensor, pool: Tensor, count: int, generator: Generator) -> Tensor:
    return torch.randint(len(pool), (count,), generator=generator, device=like.device)


def _smooth(coarse: Tensor, like: Tensor) -> Tensor:
    """[M, K, 4, 4] to [M, K, H, W]."""
    return F.interpolate(coarse, like.shape[2:], mode="bicubic", align_corners=True)


def _grid(images: Tensor, theta: Tensor) -> Tensor:
    """Where to read, [M, H, W, 2], for affine maps [M, 2, 3] of coordinates from -1 to 1."""
    return F.affine_grid(theta, list(images.shape), align_corners=False)


def _sampled(images: Tensor, grid: Tensor, outside: str = "reflection") -> Tensor:
    return F.grid_sample(images.float(), grid, padding_mode=outside, align_corners=False)


def _to_bytes(images: Tensor) -> Tensor:
    return images.round().clamp_(0, 255).to(torch.uint8)
