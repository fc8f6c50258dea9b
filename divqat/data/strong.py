"""Strong augmentation for consistency losses: RandAugment, then Cutout."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from divqat.data.distortions import rand

CHANGES_PER_IMAGE = 2
ANGLE, SHEAR, SHIFT = math.radians(30), 0.3, 0.3  # largest; shifts are shares of the side
GREY = 127
# From float images [M, C, H, W] in 0 ... 255 and strengths [M, 1, 1, 1] in [0, 1) to like images.
Change = Callable[[Tensor, Tensor], Tensor]


def strongly_augmented(images: Tensor, generator: Generator) -> Tensor:
    """RandAugment with random strengths, then Cutout, as FixMatch uses them.

    Each image takes two of the 14 changes of Sohn et al., "FixMatch" (NeurIPS 2020, appendix), at
    random, with a random strength of the ranges there. Then a grey square, of half the side and
    clipped at the border, covers a random place. Uncovered corners are black.

    Args:
        images: uint8 [N, C, H, W] on any device.
        generator: on the device of ``images``; it alone determines the result.

    Returns:
        uint8 [N, C, H, W].
    """
    for _ in range(CHANGES_PER_IMAGE):
        chosen = torch.randint(
            len(CHANGES), (len(images),), generator=generator, device=images.device
        )
        strength = rand(images, len(images), 1, 1, 1, generator=generator)
        changed = images.clone()
        for number, change in enumerate(CHANGES):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                made = change(images[rows].float(), strength[rows])
                changed[rows] = made.round().clamp_(0, 255).to(torch.uint8)
        images = changed
    return cut_out(images, generator)


def cut_out(images: Tensor, generator: Generator) -> Tensor:
    """A grey square of half the side at a random place of each image, which the border clips."""
    covered = torch.ones((), dtype=torch.bool, device=images.device)
    for axis in (2, 3):
        length = images.shape[axis]
        center = length * rand(images, len(images), 1, generator=generator)
        near = (torch.arange(length, device=images.device) + 0.5 - center).abs() < length / 4
        covered = covered & (near[:, None, :, None] if axis == 2 else near[:, None, None, :])
    return images.masked_fill(covered, GREY)


def autocontrast(x: Tensor, strength: Tensor) -> Tensor:
    """Each channel stretched to 0 ... 255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, 255 * (x - low) / (high - low).clamp(min=1), x)


def equalize(x: Tensor, strength: Tensor) -> Tensor:
    """The histogram of each channel made flat."""
    levels = x.long().flatten(2)  # [M, C, H * W]
    counts = x.new_zeros(*x.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(x).flatten(2))
    below = counts.cumsum(2)
    darkest = below.gather(2, levels.amin(2, keepdim=True))
    rest = levels.shape[2] - darkest  # pixels that are not among the darkest
    made = (255 * (below - darkest) / rest.clamp(min=1)).gather(2, levels).view_as(x)
    return torch.where(rest[..., None] > 0, made, x)


def brightness(x: Tensor, strength: Tensor) -> Tensor:
    """Darker."""
    return x * _share(strength)


def color(x: Tensor, strength: Tensor) -> Tensor:
    """Less colorful; without effect on grey images."""
    return torch.lerp(x.mean(1, keepdim=True).expand_as(x), x, _share(strength))


def contrast(x: Tensor, strength: Tensor) -> Tensor:
    """Closer to the mean."""
    return torch.lerp(x.mean((1, 2, 3), keepdim=True).expand_as(x), x, _share(strength))


def sharpness(x: Tensor, strength: Tensor) -> Tensor:
    """Blurred."""
    smooth = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(smooth, x, _share(strength))


def posterize(x: Tensor, strength: Tensor) -> Tensor:
    """The upper 4 to 8 bits."""
    step = 2 ** (4 - (5 * strength).floor())
    return (x / step).floor() * step


def solarize(x: Tensor, strength: Tensor) -> Tensor:
    """Light pixels inverted."""
    return torch.where(x >= 255 * strength, 255 - x, x)


def _share(strength: Tensor) -> Tensor:
    return 0.05 + 0.9 * strength


def _moved(matrix: Callable[[Tensor, float], list[Tensor | float]]) -> Change:
    """A change that moves pixels: ``matrix(s, H / W)``, s in [-1, 1), is the map of coordinates
    from -1 to 1, row by row."""

    def change(x: Tensor, strength: Tensor) -> Tensor:
        s = 2 * strength.flatten() - 1
        entries = matrix(s, x.shape[2] / x.shape[3])
        theta = torch.stack([torch.zeros_like(s) + entry for entry in entries], 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    return change


CHANGES: tuple[Change, ...] = (
    lambda x, strength: x,
    autocontrast,
    equalize,
    brightness,
    color,
    contrast,
    sharpness,
    posterize,
    solarize,
    _moved(lambda s, ratio: [
        (ANGLE * s).cos(), -(ANGLE * s).sin() * ratio, 0, (ANGLE * s).sin() / ratio,
        (ANGLE * s).cos(), 0,
    ]),
    _moved(lambda s, ratio: [1, SHEAR * s, 0, 0, 1, 0]),
    _moved(lambda s, ratio: [1, 0, 0, SHEAR * s, 1, 0]),
    _moved(lambda s, ratio: [1, 0, 2 * SHIFT * s, 0, 1, 0]),
    _moved(lambda s, ratio: [1, 0, 0, 0, 1, 2 * SHIFT * s]),
)  # fmt: skip
