"""Pictures put together from shapes and patterns, near the training set but outside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from divqat.data.distortions import (
    choose,
    edges,
    inverted,
    rand,
    shrunk,
    shuffled,
    toned,
    warped,
    zoomed,
)
from divqat.data.glyphs import pixels

LAYERS = 3  # maximum number of shapes in a picture
CONTRAST = 25  # from the corner of a picture to its shape, of 255


def composed(
    images: Tensor,  # uint8 [M, C, H, W]
    drawings: Tensor,  # uint8 [P, C, H, W]
    scenes: Tensor,  # uint8 [Q, C, H, W]
    generator: Generator,
) -> Tensor:  # uint8 [M, C, H, W]
    """Up to three shapes on a uniform ground, each filled with a pattern, then distorted.

    The shapes are those of drawings and of the given images, and boxes and ellipses; the patterns
    are shades, stripes and dots, scenes, drawings, and details of the given images. The ground is
    often black, white or that of an image. So there are outlines of the task with other contents,
    contents of the task with other outlines, and neither. Two in three are distorted once more:
    dimmed, inverted, shrunk, warped, shuffled, or reduced to their edges. (Ours; that shape and
    texture are separate cues, either of which a network may follow: Geirhos et al., "ImageNet-
    trained CNNs are biased towards texture", ICLR 2019, arXiv 1811.12231.)

    Args:
        images: of the task.
        drawings: from :func:`divqat.data.glyphs.glyphs`.
        scenes: from :func:`divqat.data.leaves.leaves`.
        generator: on their device. There is no host sync.
    """
    layers = 1 + _integers(images, LAYERS, generator)
    picture = _ground(images, generator)
    for layer in range(LAYERS):
        mask = _shape(images, drawings, generator) & (layer < layers)
        picture = torch.where(mask, _pattern(images, drawings, scenes, generator), picture)
    ways = (toned, edges, shrunk, inverted, warped, shuffled)
    distorted = [way(picture, generator) for way in ways]
    return _pick([picture] * (len(ways) // 2) + distorted, generator)


def _ground(images: Tensor, generator: Generator) -> Tensor:
    """Uniform pictures: black, white, a random shade or the upper left pixel of an image."""
    m, channels = images.shape[:2]
    shade = (256 * rand(images, m, channels, 1, 1, generator=generator)).to(torch.uint8)
    corner = images[choose(images, images, m, generator)][:, :, :1, :1]
    black, white = torch.zeros_like(shade), torch.full_like(shade, 255)
    ground = _pick([black, black, white, shade, corner, corner], generator)
    return ground.expand(images.shape)


def _shape(images: Tensor, drawings: Tensor, generator: Generator) -> Tensor:
    """Masks, bool [M, 1, H, W]."""
    m = len(images)
    drawing = drawings[choose(images, drawings, m, generator)]
    image = images[choose(images, images, m, generator)]
    boxes = [_box(images, generator) for _ in range(2)]
    picture = _pick([drawing, image, *boxes], generator).float().mean(1, keepdim=True)
    return (picture - picture[:, :, :1, :1]).abs() > CONTRAST


def _pattern(images: Tensor, drawings: Tensor, scenes: Tensor, generator: Generator) -> Tensor:
    m = len(images)
    return _pick(
        [
            *(_shade(images, generator) for _ in range(2)),
            _stripes(images, generator),
            scenes[choose(images, scenes, m, generator)],
            drawings[choose(images, drawings, m, generator)],
            zoomed(images[choose(images, images, m, generator)], generator),
        ],
        generator,
    )


def _box(images: Tensor, generator: Generator) -> Tensor:
    """White boxes and ellipses on black, rotated or not."""
    m, channels, height, width = images.shape
    x, y = pixels(images).unbind(-1)  # [P], P = H · W
    across, down = (0.8 * rand(images, 2, m, 1, generator=generator) - 0.4).unbind()
    length, breadth = (0.2 + 0.75 * rand(images, 2, m, 1, generator=generator)).unbind()
    turned = rand(images, m, 1, generator=generator) < 0.3
    angle = math.pi * turned * rand(images, m, 1, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    u = ((x - across) * cos + (y - down) * sin) / length
    v = ((y - down) * cos - (x - across) * sin) / breadth
    ellipse, box = u * u + v * v, torch.maximum(u.abs(), v.abs())
    inside = torch.where(rand(images, m, 1, generator=generator) < 0.5, ellipse, box) < 1
    return (255 * inside.to(torch.uint8)).view(m, 1, height, width).expand(-1, channels, -1, -1)


def _shade(images: Tensor, generator: Generator) -> Tensor:
    """Uniform shades, or with a gradient in a random direction."""
    m, channels, height, width = images.shape
    x, y = pixels(images).unbind(-1)
    steep = (rand(images, 2, m, 1, generator=generator) - 0.5).unbind()
    graded = rand(images, m, 1, generator=generator) < 0.4
    gradient = (graded * (steep[0] * x + steep[1] * y)).view(m, 1, height, width)
    shade = rand(images, m, channels, 1, 1, generator=generator) + gradient
    return (255 * shade.clamp(0, 1)).round().to(torch.uint8)


def _stripes(images: Tensor, generator: Generator) -> Tensor:
    """Stripes, checks, grids and dots of two shades, one to eight of them across the picture."""
    m, channels, height, width = images.shape
    x, y = pixels(images).unbind(-1)
    eighths = torch.floor(8 * rand(images, m, 1, generator=generator))
    angle = math.pi / 8 * (eighths + (rand(images, m, 1, generator=generator) < 0.4) * 0.5)
    density = 2 ** (3 * rand(images, m, 1, generator=generator)) / 2  # per half of the side
    offset = rand(images, 2, m, 1, generator=generator)
    u = ((x * angle.cos() + y * angle.sin()) * density + offset[0]) % 1
    v = ((y * angle.cos() - x * angle.sin()) * density + offset[1]) % 1
    share = 0.2 + 0.6 * rand(images, m, 1, generator=generator)
    across, down = u < share, v < share
    dots = (u - 0.5).square() + (v - 0.5).square() < (share / 2).square()
    on = _pick([across, across ^ down, across | down, dots], generator).view(m, 1, height, width)
    dark, light = rand(images, 2, m, channels, 1, 1, generator=generator).unbind()
    return (255 * torch.where(on, light, dark)).round().to(torch.uint8)


def _pick(pictures: Sequence[Tensor], generator: Generator) -> Tensor:
    """Of each row that of one of ``pictures`` [M, …], all of one shape, at random."""
    stacked = torch.stack(list(pictures))
    row = torch.arange(stacked.shape[1], device=stacked.device)
    chosen = torch.randint(len(stacked), row.shape, generator=generator, device=stacked.device)
    return stacked[chosen, row]


def _integers(images: Tensor, count: int, generator: Generator) -> Tensor:
    """Random numbers from 0 to count - 1, int64 [M, 1, 1, 1]."""
    shape = (len(images), 1, 1, 1)
    return torch.randint(count, shape, generator=generator, device=images.device)
