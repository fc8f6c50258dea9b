"""The fake-quantizers of torch.ao and of torchao, which have the same interface."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from bench.case import import_peer

EAGER, FUSED = "FakeQuantize", "FusedMovingAvgObsFakeQuantize"
# contender → (module, package, class); torchao's PT2E quantizers for x86 use the fused class
QUANTIZERS = {
    "torch.ao FakeQuantize": ("torch.ao.quantization", "torch.ao", EAGER),
    "torch.ao fused": ("torch.ao.quantization", "torch.ao", FUSED),
    "torchao PT2E": ("torchao.quantization.pt2e", "torchao", FUSED),
}


def quantizer(contender: str, observer: str, signed: bool, **options: Any) -> nn.Module:
    """A fake-quantizer with the named observer.

    Raises:
        Absent: its package is not installed.
    """
    name, package, kind = QUANTIZERS[contender]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is being removed from PyTorch
        source = import_peer(name, package)
        dtypes = (torch.uint8, torch.int8) if package == "torchao" else (torch.quint8, torch.qint8)
        return getattr(source, kind)(
            observer=getattr(source, observer), dtype=dtypes[signed], **options
        )
