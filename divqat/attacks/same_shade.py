"""Compare each answer with those to pictures of the same lights and shades."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divqat._util.settings import option
from divqat.attacks.answers import centred_logs, reading
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets
from divqat.nn.decoy import GRID

CHUNK = 4096  # images that are shuffled at once, for the sake of memory


@dataclass(frozen=True, kw_only=True)
class SameShade(KnockoffNets):
    """KnockoffNets on how the answer to an image differs from those to shuffled copies of it.

    Ours, against :class:`divqat.nn.decoy.Decoy`, by a thief who knows how it works and not its
    seed: a copy whose pixels are shuffled inside small blocks has the same coarse picture, so the
    same decoy, and shows nothing else. The clone learns

        r(softmax(log y(x) - mean_i log y(x_i))),    r the ``reading``, x_i the copies,

    which costs 1 + ``copies`` queries an image. In our hands it is a control more than a threat: a
    network answers a shuffled picture in another way for other reasons, too.

    Args:
        query_budget: images asked about, copies counted: ``query_budget // (1 + copies)`` images
            are drawn from the query set; None: all of them.
        copies: of each image.
        reading: what the clone learns of the differences.
    """

    copies: int = option(2, "Shuffled copies of each image.", least=1)
    reading: str = option("standardized2", "What the clone learns of the differences.")

    def check(self, images: int) -> None:
        least, most = 1 + self.copies, (1 + self.copies) * images
        if self.query_budget is not None and not least <= self.query_budget <= most:
            raise ValueError(
                f"query_budget: wanted {least} to {most}, the size of the query set and its "
                f"{self.copies} copies, got {self.query_budget}"
            )

    def _draw(self, task: Task, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(task.query_set), generator=generator)
        some = len(order) if self.query_budget is None else self.query_budget // (1 + self.copies)
        return order[:some]

    def _ask(self, task: Task, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = task.query_set[rows]
        copies = [
            torch.cat([shuffled_inside(part) for part in images.split(CHUNK)])
            for _ in range(self.copies)
        ]
        asked = torch.cat([images, *copies])  # [(1 + copies) * N, C, H, W]
        return asked, task.ask(asked)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        count = len(images) // (1 + self.copies)
        logs = centred_logs(answers).view(1 + self.copies, count, -1)
        left = (logs[0] - logs[1:].mean(0)).softmax(1)
        return images[:count], reading(self.reading)(left)


def shuffled_inside(images: Tensor) -> Tensor:  # uint8 [N, C, H, W] -> like images
    """Pixels, all channels together, at random in the largest blocks whose shuffling changes no
    mean of an 8 x 8 grid as ``adaptive_avg_pool2d`` has it. Chance is torch's global generator."""
    height, width = images.shape[2:]
    rows, columns = block_of(height), block_of(width)
    blocks = (rows[:, None] * (columns.max() + 1) + columns).flatten()  # [H * W]
    place = blocks.argsort(stable=True)  # the pixels block by block
    keys = blocks + torch.rand(len(images), height * width, dtype=torch.float64)
    source = keys.argsort(1)  # the same blocks, in each at random
    flat = images.flatten(2)
    shuffled = torch.empty_like(flat)
    shuffled[:, :, place] = flat.gather(2, source[:, None].expand_as(flat))
    return shuffled.view_as(images)


def block_of(size: int) -> Tensor:  # int64 [size]
    """Which block each position along an axis is in: positions that the same bins of the grid
    have. Bin i is from floor(i size / 8) to ceil((i + 1) size / 8), and so bins can overlap."""
    position, bins = torch.arange(size)[:, None], torch.arange(GRID)
    first, last = bins * size // GRID, -(-(bins + 1) * size // GRID)
    inside = (first <= position) & (position < last)  # [size, GRID]
    changes = (inside[1:] != inside[:-1]).any(1).long()
    return torch.cat([torch.zeros(1, dtype=torch.int64), changes.cumsum(0)])
