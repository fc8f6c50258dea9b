"""The optimizers by name, with a learning rate that a captured step can read."""

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
    """The optimizer of a training, for ``parameters`` on ``device``.

    SGD is PyTorch's fused one: one launch for all parameters, and with a gradient scaler no look
    at a number on the host. Its learning rate is a float32 tensor [] on the device. LARS (You et
    al. 2017) and LAMB (You et al. 2020, v3) are pytorch_optimizer's.

    Raises:
        ImportError: pytorch_optimizer is missing.
    """
    common: dict[str, Any] = dict(lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "sgd":
        sgd = SGD(
            parameters,
            **{**common, "lr": torch.tensor(settings.lr, device=device)},
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            fused=True,
        )
        # Its own first step makes the buffers, and leaves garbage in them if a gradient scaler has
        # that step skipped (torch 2.13). From zeros it is the same step, bit for bit.
        for parameter in sgd.param_groups[0]["params"] if settings.momentum else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    library = require("pytorch_optimizer", EXTRA)
    if settings.optimizer == "lars":
        return library.LARS(parameters, **common, momentum=settings.momentum)
    return library.Lamb(parameters, **common)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use ``lr`` from now on; a tensor keeps its place in memory."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, but keep how and where the learning rate is kept, and what is fused."""
    own = [{key: group.get(key) for key in ("lr", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)
