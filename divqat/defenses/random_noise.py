"""Random perturbation of the answers, the baseline of defenses that choose a perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import torch
from torch import Tensor

from divqat._util.settings import option
from divqat.defenses.defense import Defense


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Defense):
    """Move the answer towards a random class j other than the most probable one.

        y' = (1 - epsilon / 2) y + (epsilon / 2) e_j,    |y' - y|_1 = epsilon (1 - y_j) <= epsilon

    The baseline "Random" of Mazeika, Li, Forsyth, "How to Steer Your Adversary", ICML 2022 and of
    Khaled et al., ICMLA 2023. They draw j anew for every answer, so that repeated queries average
    the noise out. Here j is a keyed hash of the image in 8 bits: the same image, or one that
    differs by less than a grey level, always gets the same class. An image that differs in one
    pixel gets another draw. The most probable class can change, and always does for
    epsilon > 2 s / (1 + s), where s is its probability.

    Args:
        epsilon: bound of the L1 distance, 0 to 2.
        seed: key of the hash; keep it secret.
    """

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = "epsilon"

    epsilon: float = option(0.5, "Bound of the L1 distance.", least=0, most=2)
    seed: int = option(0, "Secret seed of the random classes.", least=0)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        # j = top + d mod C with d uniform over 1 ... C - 1
        shift = 1 + self._random(images) % (probs.shape[1] - 1)  # [N]
        j = (probs.argmax(1) + shift) % probs.shape[1]  # [N]
        target = torch.zeros_like(probs).scatter(1, j[:, None], 1.0)
        return (1 - self.epsilon / 2) * probs + self.epsilon / 2 * target

    def _random(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> int64 [N], 0 to 2^62 - 1
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        key = str(self.seed).encode()
        digests = (blake2b(image.tobytes(), key=key, digest_size=8).digest() for image in pixels)
        numbers = [int.from_bytes(digest, "little") >> 2 for digest in digests]
        return torch.tensor(numbers, dtype=torch.int64)
