"""Abstract drawings: ellipses, polygons, scribbles and lines of script.

They are drawn from signed distances on the device, a batch at a time, without files or fonts. All
lengths are in halves of the picture's side: a picture spans [-1, 1] along both axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

SHAPES = 3  # maximum number of shapes in a picture
CORNERS = 6  # maximum number of corners of a polygon
TURNS, LETTERS, PER_LETTER = 5, 4, 3  # strokes of a scribble; letters of script, strokes of one


def glyphs(images: Tensor, generator: Generator) -> Tensor:
    """Random drawings, light on dark or dark on light, filled, outlined or as lines.

    One quarter each are ellipses, convex polygons, scribbles and script (a row of letters of three
    strokes between nine points), with up to three of one kind on top of each other.

    Args:
        images: [M, C, H, W]; only their shape and device are used.
        generator: on their device.

    Returns:
        uint8 [M, C, H, W].
    """
    m, channels, height, width = images.shape
    n, device = m * SHAPES, images.device

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    points = pixels(images)
    center = 1.2 * rand(n, 1, 2) - 0.6
    kind = (4 * rand(m)).long().repeat_interleave(SHAPES)[:, None]  # [n, 1]
    line = 0.04 + 0.12 * rand(n, 1)  # half the width of a line
    strokes = torch.where(
        (kind == 2)[..., None, None], _scribbles(rand, n), _script(rand, n)
    )  # [n, S, 2, 2]
    solid = torch.where(
        kind == 0, _ellipses(rand, n, points - center), _polygons(rand, n, points - center)
    )  # [n, P], negative inside
    outlined = rand(n, 1) < 0.5
    distance = torch.where(outlined, solid.abs() - line, solid)
    distance = torch.where(kind < 2, distance, _to_strokes(points, strokes) - line)
    # An edge of one pixel, for antialiasing.
    ink = (0.5 - distance * min(height, width) / 2).clamp(0, 1)  # [n, P]
    # The first shape is always drawn.
    drawn = (rand(m, SHAPES) < 0.5) | (torch.arange(SHAPES, device=device) == 0)
    ink = (ink.view(m, SHAPES, height * width) * drawn[..., None])[:, :, None]  # [m, SHAPES, 1, P]
    paper = 0.3 * rand(m, channels, 1)
    color = 0.5 + 0.5 * rand(m, SHAPES, channels, 1)
    picture = paper.expand(m, channels, height * width)
    for k in range(SHAPES):
        picture = torch.lerp(picture, color[:, k], ink[:, k])
    picture = torch.where(rand(m, 1, 1) < 0.5, picture, 1 - picture)
    return (255 * picture).round().to(torch.uint8).view(m, channels, height, width)


def pixels(images: Tensor) -> Tensor:
    """The coordinates (x, y) of the pixels of images [M, C, H, W]: [P, 2], P = H · W."""
    height, width = images.shape[2:]
    y, x = (2 * (torch.arange(k, device=images.device) + 0.5) / k - 1 for k in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).view(
        -1, 2
    )


def _ellipses(rand: Callable[..., Tensor], n: int, points: Tensor) -> Tensor:
    """The approximate signed distance of points [n, P, 2] from ellipses around 0: [n, P]."""
    radii = 0.15 + 0.65 * rand(n, 1, 2)
    angle = math.pi * rand(n, 1)
    cos, sin = angle.cos(), angle.sin()
    px, py = points.unbind(-1)
    x, y = cos * px + sin * py, cos * py - sin * px
    # (‖p / r‖ − 1) · min r
    return (torch.hypot(x / radii[..., 0], y / radii[..., 1]) - 1) * radii.amin(-1)


def _polygons(rand: Callable[..., Tensor], n: int, points: Tensor) -> Tensor:
    """The largest distance of points [n, P, 2] from the sides of convex polygons around 0."""
    corners = 3 + ((CORNERS - 2) * rand(n, 1)).long()
    k = torch.arange(CORNERS, device=points.device)
    # Normals less than half a turn apart, or the polygon would be open: 120° + 2 · 24° for three.
    angle = 2 * math.pi * (k + 0.4 * rand(n, CORNERS)) / corners + 2 * math.pi * rand(n, 1)
    reach = (0.15 + 0.5 * rand(n, CORNERS)).masked_fill(k >= corners, math.inf)
    normals = torch.stack([angle.cos(), angle.sin()], dim=-1)  # [n, CORNERS, 2]
    # max_k (p · n_k − r_k)
    return (points @ normals.transpose(1, 2) - reach[:, None]).amax(-1)


def _scribbles(rand: Callable[..., Tensor], n: int) -> Tensor:
    """Lines that turn at random: [n, S, 2 ends, 2], S = LETTERS · PER_LETTER."""
    corners = 1.8 * rand(n, TURNS + 1, 2) - 0.9
    strokes = torch.stack([corners[:, :-1], corners[:, 1:]], dim=2)
    missing = LETTERS * PER_LETTER - TURNS
    return torch.cat([strokes, strokes[:, -1:].expand(-1, missing, -1, -1)], dim=1)


def _script(rand: Callable[..., Tensor], n: int) -> Tensor:
    """Rows of letters: strokes between the nine points of each letter's cell, [n, S, 2 ends, 2]."""
    letter = torch.floor(3 * rand(n, LETTERS, PER_LETTER, 2, 2)) / 2  # in {0, 0.5, 1}
    column = torch.arange(LETTERS, dtype=letter.dtype, device=letter.device).view(-1, 1, 1)
    x = 2 * (column + 0.2 + 0.6 * letter[..., 0]) / LETTERS - 1
    tall, row = 0.3 + 0.9 * rand(n, 1, 1, 1), 0.9 * rand(n, 1, 1, 1) - 0.9
    y = row + tall * letter[..., 1]
    return torch.stack([x, y], dim=-1).flatten(1, 2)


def _to_strokes(points: Tensor, strokes: Tensor) -> Tensor:
    """Distance of points [P, 2] from the nearest of strokes [n, S, 2, 2]: [n, P]."""
    px, py = points.unbind(-1)  # [P]
    start, end = strokes[:, :, 0, :, None], strokes[:, :, 1, :, None]  # [n, S, 2, 1]
    (ax, ay), (dx, dy) = start.unbind(2), (end - start).unbind(2)  # [n, S, 1]
    # p − a − clamp(((p − a) · d) / (d · d), 0, 1) · d
    x, y = px - ax, py - ay  # [n, S, P]
    place = ((x * dx + y * dy) / (dx * dx + dy * dy).clamp(min=1e-6)).clamp_(0, 1)
    x, y = x.sub_(place * dx), y.sub_(place * dy)
    return (x * x + y * y).amin(1).sqrt()
