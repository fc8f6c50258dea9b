"""The networks of an ensemble, from their own trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from divqat.models.ensemble import MEMBERS, Ensemble
from divqat.train.config import TrainConfig
from divqat.train.folder import load_run


def load_members(model: nn.Module, config: TrainConfig, shape: Mapping[str, Any]) -> None:
    """Load the weights of ``config.members`` into an ensemble; without members do nothing.

    Raises:
        FileNotFoundError: a member was not found.
        ValueError: it is unfinished or quantized, or has another network or other data.
    """
    if config.members is None:
        return
    assert isinstance(model, Ensemble)
    for network, name, folder in zip(model.members, MEMBERS, config.members, strict=True):
        run = load_run(folder)
        if run.config.kind.quantized:
            raise ValueError(
                f"members: wanted full-precision trainings, got method {run.config.method} in "
                f"{folder}"
            )
        wanted = {setting: getattr(config, setting) for setting in config.shared} | {"model": name}
        for setting, value in wanted.items():
            got = getattr(run.config, setting)
            if got != value and setting != "data_root":
                raise ValueError(f"members: wanted {setting} {value}, got {got} in {folder}")
        if run.shape != shape:
            raise ValueError(
                f"members: wanted a model for {dict(shape)}, as the data, got {run.shape} in "
                f"{folder}"
            )
        network.load_state_dict(run.model.state_dict())
