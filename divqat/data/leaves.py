"""Dead leaves: shapes of all sizes that occlude each other, like objects in photos."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from divqat.data.glyphs import pixels

LEAVES = 24  # in a picture, one on top of the other
SMALLEST = 0.12  # smallest half length of a leaf, in halves of the picture's side; the largest is 1


def leaves(images: Tensor, generator: Generator) -> Tensor:
    """Random pictures full of diamonds, ellipses and boxes, with large ones in the background.

    They have the edges and contrasts of photos, but no recognizable objects (Lee, Mumford and
    Huang, "Occlusion models for natural images: a statistical study of a scale-invariant dead
    leaves model", IJCV 41, 2001; as training images: Baradad et al., "Learning to see by looking at
    noise", NeurIPS 2021, arXiv 2106.05963). Each leaf has a gradient of brightness.

    Args:
        images: [M, C, H, W]; only their shape and device are used.
        generator: on their device.

    Returns:
        uint8 [M, C, H, W].
    """
    m, channels, height, width = images.shape

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=images.device)

    x, y = pixels(images).unbind(-1)  # [P], P = H · W
    picture = rand(m, channels, 1).expand(m, channels, height * width)
    for k in range(LEAVES):
        # Log-uniform, from the smallest length to a largest that decreases from leaf to leaf.
        length = SMALLEST ** (1 - (1 - k / LEAVES) * rand(m, 1))
        breadth = length * (0.3 + 0.7 * rand(m, 1))
        across, down = (2.4 * rand(2, m, 1) - 1.2).unbind()  # some centers lie outside
        angle = math.pi * rand(m, 1)
        cos, sin = angle.cos(), angle.sin()
        u = ((x - across) * cos + (y - down) * sin) / length  # [m, P]
        v = ((y - down) * cos - (x - across) * sin) / breadth
        kind, uu, vv = (3 * rand(m, 1)).long(), u.square(), v.square()
        diamond, ellipse = u.abs() + v.abs(), uu + vv
        box = uu.square().square() + vv.square().square()  # its corners are round
        inside = torch.where(kind == 0, diamond, torch.where(kind == 1, ellipse, box)) < 1
        shade = rand(m, channels, 1) + (rand(m, channels, 1) - 0.5) * u[:, None]
        picture = torch.where(inside[:, None], shade.clamp(0, 1), picture)
    return (255 * picture).round().to(torch.uint8).view(m, channels, height, width)
