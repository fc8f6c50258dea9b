"""Smoothing: query augmented copies of an image and average the answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from divqat._util.settings import option
from divqat.attacks.attack import Task
from divqat.attacks.knockoff import KnockoffNets

CHUNK = 4096  # images that are augmented at a time, to bound the memory


@dataclass(frozen=True, kw_only=True)
class Smoothing(KnockoffNets):
    """Query ``copies`` of each image and learn the mean of the answers.

    The smoothing attack in the evaluation of ModelGuard (Tang et al., USENIX Security 2024), after
    the smooth retraining of Lukas et al., "SoK: How Robust is Image Classification Deep Neural
    Network Watermarking?" (IEEE S&P 2022): a perturbation that differs from answer to answer
    averages out. With ``reading`` r the target of an image x is r(1/copies sum_i y'(a_i(x))); the
    clone sees x itself.

    Deviations: a_1 is the identity, so that one copy is :class:`KnockoffNets`; ModelGuard's code
    augments all copies. It shifts small images by up to 4 of 32 pixels and mirrors them, like the
    defaults here, but does not rotate them. Its budget is the number of images, so that it queries
    three times as often as the other attacks; here every copy counts.

    Args:
        query_budget: maximum number of queries, including copies: ``query_budget // copies`` images
            are drawn from the query set; None: all images, ``copies`` times.
    """

    copies: int = option(3, "Queries per image; the first is the image itself.", least=1)
    shift: float = option(
        0.125, "Largest shift of a copy, as a fraction of its side.", least=0, below=1
    )
    angle: float = option(10.0, "Largest rotation of a copy, in degrees.", least=0, most=180)
    mirror: bool = option(True, "Mirror the copies at random.")

    def check(self, images: int) -> None:
        most, budget = images * self.copies, self.query_budget
        if budget is not None and not self.copies <= budget <= most:
            raise ValueError(
                f"query_budget: wanted {self.copies} to {most}, {self.copies} copies of each of "
                f"{images} images, got {budget}"
            )

    def _draw(self, task: Task, generator: torch.Generator) -> Tensor:
        size = len(task.query_set)
        budget = size * self.copies if self.query_budget is None else self.query_budget
        return torch.randperm(size, generator=generator)[: budget // self.copies]

    def _ask(self, task: Task, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = task.query_set[rows]
        augmented = [self._augment(images) for _ in range(self.copies - 1)]
        queries = torch.cat([images, *augmented])  # [copies * N, C, H, W]
        return queries, task.ask(queries)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        count = len(images) // self.copies
        mean = answers.view(self.copies, count, -1).mean(0)
        return super()._targets(task, images[:count], mean)

    def _augment(self, images: Tensor) -> Tensor:  # uint8 [N, C, H, W] -> like images
        """Every image rotated, mirrored and shifted at random, with black borders."""
        return torch.cat([self._augment_chunk(chunk) for chunk in images.split(CHUNK)])

    def _augment_chunk(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        turn, right, down = torch.rand(3, len(images)) * 2 - 1  # [N] each, in [-1, 1)
        turn = turn * math.radians(self.angle)
        side = 1 - 2 * (torch.rand(len(images)) < 0.5) * self.mirror  # 1, or -1 where mirrored
        # The source of a pixel of the copy, in units of half a side:
        # x' = side (x cos t - y sin t H/W) + 2 shift,  y' = x sin t W/H + y cos t + 2 shift
        rows = [
            [side * turn.cos(), -side * turn.sin() * height / width, 2 * self.shift * right],
            [turn.sin() * width / height, turn.cos(), 2 * self.shift * down],
        ]
        theta = torch.stack([torch.stack(row, 1) for row in rows], 1)  # [N, 2, 3]
        pixels = images.float()
        grid = F.affine_grid(theta.to(pixels), list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, align_corners=False).round().to(torch.uint8)
