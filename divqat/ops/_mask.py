"""Masks of one bit per element, packed in memory order."""

from __future__ import annotations

import torch
from torch import Tensor

# One multiplication gathers eight 0/1 bytes into the top byte, another spreads them again:
# byte i (weight 2^8i) meets the power 2^(56-7i) at bit 56 + i, and no two products collide.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - 2**64


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a dense bool tensor into uint8 [ceil(N / 8)], in memory order, low bit first.

    The memory of ``mask`` is used up.
    """
    n = mask.numel()
    flat = mask.as_strided((n,), (1,))
    if n % 8:
        flat = torch.nn.functional.pad(flat, (0, -n % 8))
    return flat.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """The first ``n`` bits of a packed mask as bool [n]."""
    spread = packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_SELECT)
    return spread.view(torch.uint8).ne_(0).view(torch.bool)[:n]
