"""Distortions that turn an image into a similar one outside its task, and noise of its size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

GRID = 4  # patches along an axis; with fewer, whole parts of an object stay visible
COARSE = 4  # points along an axis from which a smooth field is interpolated
REACH = 0.4  # largest displacement by warping, in halves of the side
PASTED = 3  # images in a collage, on top of each other


def noise(images: Tensor, generator: Generator) -> Tensor:
    """White noise or smooth noise, each with probability 1/2, from dark to light."""
    m, channels, height, width = images.shape
    white = rand(images, m, channels, height, width, generator=generator)
    smooth = _smooth(rand(images, m, channels, COARSE, COARSE, generator=generator), images)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    smooth = (smooth - low) / (high - low).clamp(min=1e-6)
    is_white = rand(images, m, 1, 1, 1, generator=generator) < 0.5
    return _to_bytes(255 * torch.where(is_white, white, smooth))


def shuffled(images: Tensor, generator: Generator) -> Tensor:
    """The 4 x 4 patches of each image in random order; remaining pixels at the right and lower edge
    stay in place."""
    m, channels, height, width = images.shape
    high, wide = height // GRID, width // GRID  # of a patch
    order = rand(images, m, GRID * GRID, generator=generator).argsort(1)
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
    """Rotated by 60° to 300°, with reflection padding."""
    m, _, height, width = images.shape
    angle = math.radians(60) + math.radians(240) * rand(images, m, generator=generator)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = height / width  # grid coordinates run from -1 to 1 along both axes
    theta = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(m, 2, 3)
    return _to_bytes(_sampled(images, _grid(images, theta)))


def inverted(images: Tensor, generator: Generator) -> Tensor:
    """Dark and light exchanged."""
    return 255 - images


def warped(images: Tensor, generator: Generator) -> Tensor:
    """Warped smoothly, each pixel by up to about a fifth of the side along each axis."""
    m = len(images)
    bend = 2 * rand(images, m, 2, COARSE, COARSE, generator=generator) - 1
    identity = torch.eye(2, 3, device=images.device).expand(m, 2, 3)
    grid = _grid(images, identity) + REACH * _smooth(bend, images).permute(0, 2, 3, 1)
    return _to_bytes(_sampled(images, grid))


def zoomed(images: Tensor, generator: Generator) -> Tensor:
    """Shrunk to 30 to 55 % of the side, or magnified 2 to 3.5 times, at a random position, randomly
    mirrored along each axis. The border is replicated."""
    m = len(images)
    near = rand(images, m, 1, generator=generator) < 0.5
    shrunk = 0.3 + 0.25 * rand(images, m, 1, generator=generator)
    magnified = 2 + 1.5 * rand(images, m, 1, generator=generator)
    step = 1 / torch.where(near, magnified, shrunk)  # in the image, per pixel of the result
    mirror = torch.where(rand(images, m, 2, generator=generator) < 0.5, -1, 1)
    offset = 0.8 * (step - 1).abs() * (2 * rand(images, m, 2, generator=generator) - 1)
    theta = torch.cat([(step * mirror).diag_embed(), offset[:, :, None]], dim=2)
    return _to_bytes(_sampled(images, _grid(images, theta), "border"))


def collage(images: Tensor, generator: Generator) -> Tensor:
    """Three images, 25 to 70 % of the side, rotated, some inverted, on a uniform background."""
    m = len(images)
    shade = 255 * rand(images, m, 1, 1, 1, generator=generator)
    black = rand(images, m, 1, 1, 1, generator=generator) < 0.5
    picture = torch.where(black, 0, shade).expand(images.shape)
    for _ in range(PASTED):
        pasted = images[choose(images, images, m, generator)].float()
        invert = rand(images, m, 1, 1, 1, generator=generator) < 0.3
        pasted = torch.where(invert, 255 - pasted, pasted)
        pasted = pasted * (0.4 + 0.6 * rand(images, m, 1, 1, 1, generator=generator))
        angle = 2 * math.pi * rand(images, m, generator=generator)
        step = 1 / (0.25 + 0.45 * rand(images, m, generator=generator))
        x, y = (1.4 * rand(images, 2, m, generator=generator) - 0.7).unbind()  # its center
        grid = _turned(images, angle, step, x, y)
        inside = grid.abs().amax(-1)[:, None] < 0.9  # without the border
        picture = torch.where(inside, _sampled(pasted, grid), picture)
    return _to_bytes(picture)


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Augmented, with the ranges of the simulated thief of MISLEADER (:mod:`divqat.nn.misleader`):
    80 to 100 % of the area with a ratio of 3/4 to 4/3, resized; mirrored, each second one; brighter
    or darker, with more or less contrast, more or less colorful, each by up to 40 %; every fifth
    one gray; rotated by up to 15°, moved by up to a tenth of the side, and 0.9 to 1.1 times as
    large, on black. The sides of a crop end at the image's, and the geometry is one bilinear
    interpolation."""
    m, picture = len(images), images.float()
    area = _uniform(images, 0.8, 1, m, generator)
    stretch = _uniform(images, math.log(3 / 4), math.log(4 / 3), m, generator).exp()
    sides = (area[:, None] * torch.stack([stretch, 1 / stretch], dim=1)).sqrt().clamp(max=1)
    center = (1 - sides) * (2 * rand(images, m, 2, generator=generator) - 1)
    mirror = torch.where(rand(images, m, generator=generator) < 0.5, -1, 1)
    for anchor in (torch.zeros_like, lambda x: _gray(x).mean((2, 3), keepdim=True), _gray):
        share = _uniform(images, 0.6, 1.4, (m, 1, 1, 1), generator)
        picture = torch.lerp(anchor(picture).expand_as(picture), picture, share).clamp(0, 255)
    gray = rand(images, m, 1, 1, 1, generator=generator) < 0.2
    picture = torch.where(gray, _gray(picture), picture)
    angle = _uniform(images, -math.pi / 12, math.pi / 12, m, generator)
    step = 1 / _uniform(images, 0.9, 1.1, m, generator)
    x, y = (0.4 * rand(images, 2, m, generator=generator) - 0.2).unbind()  # halves of the side
    grid = _turned(images, angle, step, x, y)  # in the resized crop
    inside = grid.abs().amax(-1)[:, None] <= 1
    sides = sides * torch.stack([mirror, torch.ones_like(mirror)], dim=1)
    grid = grid * sides[:, None, None] + center[:, None, None]
    return _to_bytes(torch.where(inside, _sampled(picture, grid, "border"), 0))


def edges(images: Tensor, generator: Generator) -> Tensor:
    """The Sobel gradient magnitude of each channel, with the largest value of an image white."""
    # Differences instead of a convolution: copying its kernel to a GPU would be a host sync.
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    across, down = padded[..., 2:] - padded[..., :-2], padded[:, :, 2:] - padded[:, :, :-2]
    across = across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    steep = torch.stack([across, down]).norm(dim=0)
    return _to_bytes(255 * steep / steep.amax((1, 2, 3), keepdim=True).clamp(min=1e-6))


def thresholded(images: Tensor, generator: Generator) -> Tensor:
    """White where a channel exceeds its mean over the image, black elsewhere."""
    mean = images.float().mean((2, 3), keepdim=True)
    return (images > mean).to(torch.uint8) * 255


def toned(images: Tensor, generator: Generator) -> Tensor:
    """With another gamma, from 0.35 to 2.8, and dimmed to 25 to 100 %; two in five on lighter
    black."""
    m = len(images)
    gamma = 2 ** (3 * rand(images, m, 1, 1, 1, generator=generator) - 1.5)
    top = 0.25 + 0.75 * rand(images, m, 1, 1, 1, generator=generator)
    raised = rand(images, m, 1, 1, 1, generator=generator) < 0.4
    low = 0.8 * top * raised * rand(images, m, 1, 1, 1, generator=generator)
    return _to_bytes(255 * (low + (top - low) * (images / 255) ** gamma))


def shrunk(images: Tensor, generator: Generator) -> Tensor:
    """Shrunk to 35 to 95 % of the side, half of them narrowed, at a random position, on black or,
    three in ten, a uniform ground."""
    m, channels = images.shape[:2]
    size = 0.35 + 0.6 * rand(images, m, 1, generator=generator)
    narrowed = rand(images, m, 1, generator=generator) < 0.5
    narrow = torch.where(narrowed, 0.5 + 0.5 * rand(images, m, 1, generator=generator), 1)
    step = 1 / torch.cat([size * narrow, size], dim=1)  # in the image, per pixel of the result
    offset = (step - 1) * (2 * rand(images, m, 2, generator=generator) - 1)
    theta = torch.cat([step.diag_embed(), offset[:, :, None]], dim=2)
    grid = _grid(images, theta)
    shade = 255 * rand(images, m, channels, 1, 1, generator=generator)
    ground = torch.where(rand(images, m, 1, 1, 1, generator=generator) < 0.3, shade, 0)
    inside = grid.abs().amax(-1)[:, None] < 1
    return _to_bytes(torch.where(inside, _sampled(images, grid, "border"), ground))


def mixed(
    images: Tensor,  # uint8 [N, C, H, W]
    labels: Tensor | None,  # int64 [N]
    rows: Tensor,  # int64 [M]
    generator: Generator,
) -> Tensor:  # uint8 [M, C, H, W]
    """``images[rows]``, each mixed with 40 to 60 % of an image of another class (Zhang et al.,
    "mixup: Beyond empirical risk minimization", ICLR 2018, §2, there with any share). Without
    labels the other image is any; if all images have one class, it is the first."""
    scores = rand(images, len(rows), len(images), generator=generator)
    if labels is not None:
        scores = scores.masked_fill(labels[rows, None] == labels, -1)
    share = 0.4 + 0.2 * rand(images, len(rows), 1, 1, 1, generator=generator)
    others = images[scores.argmax(1)].float()
    return _to_bytes(torch.lerp(images[rows].float(), others, share))


def rand(like: Tensor, *shape: int, generator: Generator) -> Tensor:
    """Uniform random numbers in [0, 1), float32, on the device of ``like``."""
    return torch.rand(shape, generator=generator, device=like.device)


def choose(like: Tensor, pool: Tensor, count: int, generator: Generator) -> Tensor:
    """Random rows of ``pool``, int64 [count], on the device of ``like``."""
    return torch.randint(len(pool), (count,), generator=generator, device=like.device)


def _uniform(
    like: Tensor, low: float, high: float, shape: int | tuple[int, ...], generator: Generator
) -> Tensor:
    """Uniform random numbers in [low, high)."""
    shape = (shape,) if isinstance(shape, int) else shape
    return low + (high - low) * rand(like, *shape, generator=generator)


def _gray(images: Tensor) -> Tensor:
    """The luma of RGB images, else the mean of the channels; float32 [M, 1, H, W]."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601


def _smooth(coarse: Tensor, like: Tensor) -> Tensor:
    """[M, K, 4, 4] to [M, K, H, W]."""
    return F.interpolate(coarse, like.shape[2:], mode="bicubic", align_corners=True)


def _grid(images: Tensor, theta: Tensor) -> Tensor:
    """Sampling grids [M, H, W, 2] of affine maps [M, 2, 3] of coordinates from -1 to 1."""
    return F.affine_grid(theta, list(images.shape), align_corners=False)


def _turned(images: Tensor, angle: Tensor, step: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sampling grids [M, H, W, 2] of images that are turned about their centers and moved there to
    (x, y); ``step`` is in the image, per pixel of the result; each [M]."""
    ratio = images.shape[2] / images.shape[3]  # grid coordinates run from -1 to 1 along both axes
    cos, sin = step * angle.cos(), step * angle.sin()
    rows = [cos, -sin * ratio, sin * ratio * y - cos * x]
    rows += [sin / ratio, cos, -sin / ratio * x - cos * y]
    return _grid(images, torch.stack(rows, dim=1).view(-1, 2, 3))


def _sampled(images: Tensor, grid: Tensor, outside: str = "reflection") -> Tensor:
    return F.grid_sample(images.float(), grid, padding_mode=outside, align_corners=False)


def _to_bytes(images: Tensor) -> Tensor:
    return images.round().clamp_(0, 255).to(torch.uint8)
