"""Building and checking the network of a training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat import models
from divqat._util.bounds import MAX_INPUT
from divqat._util.files import load_checkpoint
from divqat._util.foreign import is_foreign
from divqat._util.seeds import derived_seed
from divqat._util.settings import ConfigError
from divqat.data import Splits
from divqat.nn import FakeQuantize
from divqat.quantize import prepare, preset
from divqat.quantize.layer_bits import parse_layer_bits
from divqat.train.batchnorm import synchronize_batchnorm
from divqat.train.config import TrainConfig
from divqat.train.distributed import World
from divqat.victim.outputs import LastOperation


def build_model(config: TrainConfig, shape: Mapping[str, Any]) -> nn.Module:
    """The float or prepared network of a configuration, with initial weights from its seed."""
    # From the teacher's initial weights a nasty network would follow the teacher's path, along
    # which their divergence and its gradient are 0.
    purpose = (config.method,) if config.method == "nasty" else ()
    model = build_float(config.model, config.seed, shape, *purpose)
    if not config.kind.quantized:
        return model
    quantization = preset(
        config.preset,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        first_last_bits=config.first_last_bits,
    )
    quantization = replace(
        quantization,
        rectify_output=config.rejects,
        layer_bits=parse_layer_bits(config.layer_bits),
    )
    return prepare(model, quantization, example_input(shape))


def check_size(name: str, shape: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint holds as many weights as a network of its shape, before allocating
    memory for the network. The size of a user's own network is not checked.

    Raises:
        ValueError: the checkpoint holds fewer weights, or its shape is invalid or too large.
    """
    try:
        sizes = [shape["in_channels"], *shape["image_size"]]
        valid = all(type(size) is int and size > 0 for size in (*sizes, shape["num_classes"]))
        if not valid or len(sizes) != 3 or math.prod(sizes) > MAX_INPUT:
            raise ValueError(f"the shape is invalid or too large: {dict(shape)}")
        if not is_foreign(name):
            with torch.device("meta"):
                wanted = sum(p.numel() for p in build_float(name, 0, shape).parameters())
            held = sum(value.numel() for value in state.values() if isinstance(value, Tensor))
            if held < wanted:
                raise ValueError(f"wanted {wanted} weights, got {held}")
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not from a training: {error}") from error


def build_float(name: str, seed: int, shape: Mapping[str, Any], *purpose: str) -> nn.Module:
    """A float network. Its initial weights depend on ``seed`` and ``purpose``."""
    with torch.random.fork_rng([]):
        torch.manual_seed(derived_seed(seed, "init", *purpose))
        return models.build(
            name,
            in_channels=shape["in_channels"],
            num_classes=shape["num_classes"],
            image_size=tuple(shape["image_size"]),
        )


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict that was saved elsewhere.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a state dict, or that of another network.
    """
    state = load_checkpoint(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"weights: wanted a state dict of the network in {path}: {' '.join(str(error).split())}"
        ) from error


def shape_of(splits: Splits) -> dict[str, Any]:
    """in_channels, num_classes and image_size of a network for this data set."""
    return {
        "in_channels": splits.channels,
        "num_classes": splits.num_classes,
        "image_size": list(splits.image_size),
    }


def example_input(shape: Mapping[str, Any]) -> Tensor:
    """float32 zeros [2, C, H, W]."""
    return torch.zeros(2, shape["in_channels"], *shape["image_size"])


def check_layer_bits(config: TrainConfig, shape: Mapping[str, Any]) -> None:
    """Check that ``layer_bits`` names layers of the network; ConfigError if not."""
    if config.layer_bits and config.kind.quantized:
        try:
            build_model(config, shape)
        except ValueError as error:
            if not str(error).startswith("layer_bits"):
                raise
            raise ConfigError(str(error)) from error


def check_logits(model: nn.Module, images: Tensor) -> None:
    """Refuse, by ValueError, a network that ends in a softmax or sigmoid; the loss applies it."""
    with torch.no_grad(), LastOperation() as last:
        kind = last.kind(copy.deepcopy(model).eval()(images))
    if kind in ("probabilities", "sigmoids"):
        raise ValueError(
            f"model: wanted a network that returns logits, got {kind}; remove its last activation"
        )


def build_initial_model(
    config: TrainConfig, shape: Mapping[str, Any], teacher: nn.Module | None, world: World
) -> nn.Module:
    """The network at the start of a training, on the device of ``world``.

    Args:
        config: the settings.
        shape: in_channels, num_classes, image_size.
        teacher: a full-precision network, whose weights a quantized one starts from.
        world: the processes of the training.
    """
    model = build_model(config, shape)
    if is_foreign(config.model) and not config.kind.quantized:
        check_logits(model, example_input(shape))
    if config.weights is not None:
        load_weights(model, config.weights)
    if teacher is not None and config.kind.quantized:
        model.load_state_dict(teacher.state_dict())
    # Convolutions and batch norms are faster in channels_last, on CPUs and on tensor cores.
    model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.uses_delayed_ranges(world.size):
        for module in model.modules():
            if isinstance(module, FakeQuantize):
                module.mode = "delayed"
    if config.sync_batchnorm and world.size > 1:
        synchronize_batchnorm(model)
    return model
