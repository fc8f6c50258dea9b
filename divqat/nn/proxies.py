"""A module that draws proxies of an attacker's queries; its pools of images move with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from divqat._util.seeds import derived_seed
from divqat.data.proxies import proxy_batch, proxy_pools


class ProxySource(nn.Module):
    """Draws proxies, see :mod:`divqat.data.proxies`.

    Args:
        kinds: from :data:`divqat.data.proxies.NAMES`, in equal numbers.
        image_shape: (C, H, W).
        folder: pictures for the kind ``folder``.
        seed: of the pools, which hold the drawings among the proxies.

    Raises:
        See :func:`divqat.data.proxies.proxy_pools`.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        image_shape: tuple[int, int, int],
        *,
        folder: str | None = None,
        seed: int,
    ) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        pools = proxy_pools(
            self.kinds,
            image_shape,
            torch.device("cpu"),
            folder=folder,
            seed=derived_seed(seed, "proxy pools"),
        )
        for name, pool in pools.items():
            self.register_buffer(f"pool_{name}", pool, persistent=False)
        self.pools = tuple(pools)

    def forward(
        self,
        images: Tensor,  # uint8 [N, C, H, W], N at least 1
        generator: Generator,
        count: int,
        labels: Tensor | None = None,  # int64 [N], for the kind ``mixed``
    ) -> Tensor:  # uint8 [count, C, H, W]
        pools = {name: self.get_buffer(f"pool_{name}") for name in self.pools}
        return proxy_batch(self.kinds, images, generator, count, labels=labels, pools=pools)
