"""Recompress and resample pictures before they are asked about."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from torch import Tensor

from divqat._util.errors import require
from divqat._util.progress import progress
from divqat._util.settings import ConfigError, option
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets


@dataclass(frozen=True, kw_only=True)
class ReEncode(KnockoffNets):
    """KnockoffNets about pictures that went through another size and JPEG once more.

    Ours, against victims that mislead about what is foreign to them: that must not hang on how a
    picture was compressed, scaled and sharpened. Each picture is scaled by a factor between
    ``smallest`` and 1 / ``smallest`` and back, by a random filter each time, and is compressed with
    a random quality. The clone learns the pictures as they were asked.

    Args:
        smallest: least factor of the side.
        worst, best: ends of JPEG's quality.

    Raises:
        ConfigError: ``worst`` is above ``best``. ImportError: Pillow is missing.
        ValueError: images of other than one or three channels.
    """

    smallest: float = option(0.6, "Least factor of the side.", above=0.1, most=1)
    worst: int = option(60, "Least quality of JPEG.", least=1, most=100)
    best: int = option(95, "Best quality of JPEG.", least=1, most=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.worst > self.best:
            raise ConfigError(f"worst: wanted at most best = {self.best}, got {self.worst}")

    def _ask(self, task: Task, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = task.query_set[rows]
        if images.shape[1] not in (1, 3):
            raise ValueError(f"query_set: wanted 1 or 3 channels, got {images.shape[1]}")
        chance = torch.Generator().manual_seed(self.seed)
        parts = progress(images, "re-encoding", total=len(images), unit="image")
        asked = torch.stack([self._encoded(image, chance) for image in parts])
        return asked, task.ask(asked)

    def _encoded(self, image: Tensor, chance: torch.Generator) -> Tensor:
        """uint8 [C, H, W], like ``image``."""
        pillow = require("PIL.Image", "data")
        numpy = require("numpy", "data")
        size = tuple(image.shape[:0:-1])  # width, height
        scale, quality = torch.rand(2, generator=chance).tolist()
        filters = torch.randint(2, (2,), generator=chance).tolist()
        resampling = (pillow.Resampling.BILINEAR, pillow.Resampling.LANCZOS)
        factor = self.smallest ** (1 - 2 * scale)
        other = tuple(max(1, round(side * factor)) for side in size)
        picture = pillow.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        picture = picture.resize(other, resampling[filters[0]]).resize(size, resampling[filters[1]])
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.worst + round(quality * (self.best - self.worst)))
        values = torch.from_numpy(numpy.array(pillow.open(file)))
        return values.view(*image.shape[1:], -1).permute(2, 0, 1).contiguous()
