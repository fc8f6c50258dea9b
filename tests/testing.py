"""The vocabulary of the tests: dtypes, devices, tensors, tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Relative tolerance of one rounding, for comparisons that cannot be bit-equal.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def tensor(values, dtype=torch.float32, device="cpu") -> Tensor:
    """A tensor from nested lists."""
    return torch.tensor(values, dtype=dtype, device=device)


def randn(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> Tensor:
    """Normal values that depend on the seed alone, not on dtype or device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def bits(x: Tensor) -> Tensor:
    """The bit pattern of a float tensor, so that 0.0 and -0.0 differ and NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer)
