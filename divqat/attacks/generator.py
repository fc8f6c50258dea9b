"""The generator of the data-free attacks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    """Generates images from noise: a linear layer to a quarter of the size, then nearest-neighbor
    upsampling twice, with 3x3 convolutions, batch norm and leaky ReLUs.

    Source: the public code of Truong et al. (DFME, CVPR 2021) and of Kariyappa et al. (MAZE, CVPR
    2021), which differ only in the last batch norm: that of DFME has no weights. Their images are
    32x32; here any size is allowed, as upsampling goes to the exact size.

    Args:
        latent: length of the noise.
        shape: [C, H, W] of an image.
        learn_range: whether the last batch norm has weights, which set brightness and contrast;
            without them the pixels of a batch have mean 0 and variance 1 in every channel.
    """

    def __init__(self, latent: int, shape: tuple[int, int, int], *, learn_range: bool) -> None:
        super().__init__()
        channels, height, width = shape
        sizes = [(-(-height // part), -(-width // part)) for part in (4, 2, 1)]
        self.start = (128, *sizes[0])
        self.sizes = sizes[1:]
        self.linear = nn.Linear(latent, 128 * sizes[0][0] * sizes[0][1])
        self.norm = nn.BatchNorm2d(128)
        self.convs = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(128, out, 3, padding=1), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)
                )
                for out in (128, 64)
            ]
        )
        self.last = nn.Sequential(
            nn.Conv2d(64, channels, 3, padding=1), nn.BatchNorm2d(channels, affine=learn_range)
        )

    def forward(self, z: Tensor) -> Tensor:  # [N, latent] -> [N, C, H, W]
        """Images before the tanh that brings them into [-1, 1]."""
        x = self.norm(self.linear(z).unflatten(1, self.start))
        for conv, size in zip(self.convs, self.sizes, strict=True):
            x = conv(F.interpolate(x, size=size))
        return self.last(x)
