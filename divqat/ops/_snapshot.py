"""Values that must reach a compiled backward as they were in the forward."""

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
    """What was computed from buffers that this step changes, small and without gradient.

    torch.compile may compute anything again in the backward rather than keep it, and up to 2.13 it
    does so from buffers that the forward has changed in place since: silently wrong gradients
    (pytorch/pytorch pull request 197039). It never computes the output of an opaque op again.
    Outside a compiler this is nothing.
    """
    return torch.ops.divqat.snapshot(values) if torch.compiler.is_compiling() else list(values)
