"""The optimizers, with a learning rate that a captured step can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from divqat._util.errors import require
from divqat.train.settings import OptimizerSettings

EXTRA = "large-batch"


def build_optimizer(
    settings: OptimizerSettings, parameters: Iterable[nn.Parameter], device: torch.device
) -> Optimizer:
    """Build the optimizer of a training for ``parameters`` on ``device``.

    SGD is PyTorch's fused implementation: one launch for all parameters, and no host sync with a
    gradient scaler. Its learning rate is a float32 tensor [] on the device. LARS (You et al. 2017)
    and LAMB (You et al. 2020, v3) come from pytorch_optimizer.

    Raises:
        ImportError: pytorch_optimizer is missing, with LARS or LAMB.
    """
    common: dict[str, Any] = dict(lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return build_sgd(
            parameters, device, **common, momentum=settings.momentum, nesterov=nesterov
        )
    library = require("pytorch_optimizer", EXTRA)
    if settings.optimizer == "lars":
        return library.LARS(parameters, **common, momentum=settings.momentum)
    return library.Lamb(parameters, **common)


def build_sgd(
    parameters: Iterable[nn.Parameter], device: torch.device, *, lr: float, **settings: Any
) -> SGD:
    """PyTorch's fused SGD; see :func:`build_optimizer`."""
    sgd = SGD(parameters, lr=torch.tensor(lr, device=device), fused=True, **settings)
    # SGD allocates these buffers in its first step, and leaves garbage in them if the gradient
    # scaler skips that step (torch 2.13). Starting from zeros gives the same bits.
    for parameter in sgd.param_groups[0]["params"] if settings["momentum"] else ():
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate; a tensor is filled in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, but keep ``fused`` and the tensor or number that holds the learning rate.
    Its value is set before each step."""
    current = [{key: group.get(key) for key in ("lr", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, current, strict=True):
        group.update(values)
