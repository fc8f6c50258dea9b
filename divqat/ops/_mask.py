"""Masks of one bit per element, packed in memory order.

The ops save such masks; the references have bool masks. Packing views bytes as int64, which no
compiler fuses, whereas a bool mask need not be stored at all: torch.compile decides whether to save
it or to recompute it in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One multiplication gathers eight 0/1 bytes into the top byte, another spreads them again:
# byte i (weight 2^8i) meets the power 2^(56-7i) at bit 56 + i, and no two products collide.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - 2**64


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a dense bool tensor into uint8 [ceil(N / 8)], in memory order, low bit first.

    The memory of ``mask`` is overwritten.
    """
    n = mask.numel()
    flat = mask.as_strided((n,), (1,))
    if n % 8:
        flat = torch.nn.functional.pad(flat, (0, -n % 8))
    return flat.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """A packed mask as bool, with the strides of ``like``, which must be dense."""
    spread = packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_SELECT)
    kept = spread.view(torch.uint8).ne_(0).view(torch.bool)
    return kept.as_strided(like.shape, like.stride())


def with_packed_mask(
    reference: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap a function that returns a value and a dense bool mask, so that the mask is packed."""

    def op(*args: Any) -> tuple[Tensor, Tensor]:
        y, mask = reference(*args)
        return y, pack_mask(mask)

    return op
