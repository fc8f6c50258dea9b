"""Whole training steps on the CPU: what quantization-aware training costs over float training."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.models import ResNet20


def resnet20(batch: int) -> dict[str, Callable[[], object]]:
    """A training step of ResNet-20 on [batch, 3, 32, 32], channels_last, by each contender.

    ``fp32``, ours with exact and delayed ranges, and torch.ao's FX-prepared model with its fused
    observers; forward, cross-entropy, backward, SGD with momentum.
    """
    torch.manual_seed(0)
    model = ResNet20(in_channels=3, num_classes=10).train()
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    target = torch.randint(0, 10, (batch,))
    delayed = dataclasses.replace(divqat.preset("x86"), mode="delayed")
    models = {
        "fp32": copy.deepcopy(model),
        "divqat": divqat.prepare(model, "x86", x),
        "divqat, delayed ranges": divqat.prepare(model, delayed, x),
        "torch.ao, fused observers": _torch_ao(model, x),
    }

    def step(model: nn.Module) -> Callable[[], object]:
        model = model.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), target).backward()
            optimizer.step()

        return run

    return {name: step(model) for name, model in models.items()}


def _torch_ao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Only for the comparison: torch.ao.quantization is being removed from PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        mapping = get_default_qat_qconfig_mapping("x86", version=1)
        return prepare_qat_fx(copy.deepcopy(model), mapping, (x,))
