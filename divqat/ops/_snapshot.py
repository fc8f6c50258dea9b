"""Values that a compiled backward must not recompute."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("divqat", "FRAGMENT")
_library.define(
    "snapshot(Tensor[] values) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _copies(values: list[Tensor]) -> list[Tensor]:
    return [value.clone() for value in values]


_library.impl("snapshot", _copies, "CompositeExplicitAutograd")
torch.library.register_fake("divqat::snapshot", _copies, lib=_library)


def snapshot(*values: Tensor) -> list[Tensor]:
    """Mark small values without gradient that were computed from buffers which this step changes.

    torch.compile may recompute values in the backward instead of saving them. Up to 2.13 it does so
    even from buffers that the forward has changed in place since, which gives silently wrong
    gradients (pytorch/pytorch pull request 197039). It never recomputes the output of an opaque op.
    Outside a compiler this has no effect.
    """
    return torch.ops.divqat.snapshot(values) if torch.compiler.is_compiling() else list(values)
