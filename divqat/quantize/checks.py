"""Checks of the arguments of prepare and convert: their order, computed weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from divqat._util.modes import modes_kept
from divqat.nn._layer import QuantLayer
from divqat.nn.fake_quantize import FakeQuantize
from divqat.quantize.config import QuantConfig
from divqat.quantize.deployed import IntegerLayer


def check_types(model: object, config: object, example_input: object) -> None:
    """Check that the arguments of :func:`divqat.prepare` are in order; TypeError if not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    order = "; call prepare(model, config, example_input)"
    if not isinstance(config, (str, QuantConfig)):
        raise TypeError(
            "config: wanted a QuantConfig or the name of a preset, got "
            f"{type(config).__name__}{order}"
        )
    if isinstance(example_input, (str, QuantConfig, nn.Module)):
        raise TypeError(
            "example_input: wanted a batch that the model accepts, got "
            f"{type(example_input).__name__}{order}"
        )


def check_is_float(model: nn.Module) -> None:
    """Check that a model is neither prepared nor converted; ValueError if it is."""
    if any(isinstance(module, IntegerLayer) for module in model.modules()):
        raise ValueError("model: wanted a float model, got one that is already converted")
    if any(isinstance(module, (QuantLayer, FakeQuantize)) for module in model.modules()):
        raise ValueError("model: wanted a float model, got one that is already prepared")


def check_is_prepared(name: str, model: nn.Module, types: tuple[type, ...] = (QuantLayer,)) -> None:
    """Check that a model is not converted and has a module of ``types``; ValueError if not."""
    wanted = f"{name}: wanted a model made by divqat.prepare, got"
    if any(isinstance(module, IntegerLayer) for module in model.modules()):
        raise ValueError(f"{wanted} one that is already converted")
    if not any(isinstance(module, types) for module in model.modules()):
        raise ValueError(f"{wanted} no quantized layer")


def check_parameters(name: str, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Check that weight and bias of all layers are parameters; ValueError if not.

    A weight that a hook computes is that of the last forward pass, and cannot be folded.

    Args:
        name: of the argument, for the error.
        layers: with their names.
    """
    for path, layer in layers:
        for tensor in ("weight", "bias"):
            if tensor in layer._parameters or not isinstance(getattr(layer, tensor), Tensor):
                continue
            raise ValueError(
                f"{name}: wanted plain parameters, got a {tensor} of {path!r} that is computed "
                "from others (pruned, weight-normed ...); first call "
                f"torch.nn.utils.{_remedy(layer, tensor)}"
            )


def check_example(model: nn.Module, example_input: Any) -> None:
    """Check that the model runs on the example, to tell a wrong example from a tracing failure;
    ValueError if not."""
    args, kwargs = as_call(example_input)
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            model(*args, **kwargs)
    except Exception as error:  # the model's forward may raise anything
        raise ValueError(
            "example_input: wanted a batch that the model accepts, got one on which it raises "
            f"{type(error).__name__}: {error}"
        ) from error


def as_call(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call: a tensor, a tuple of several, or a dictionary by name."""
    if isinstance(example_input, dict):
        return (), example_input
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}


def deep_copy(name: str, model: nn.Module) -> nn.Module:
    """A deep copy of ``model``; ValueError with the reason if it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a module of the user may raise anything
        raise ValueError(
            f"{name}: wanted a model that copy.deepcopy copies, got {type(error).__name__}: {error}"
        ) from error


def _remedy(module: nn.Module, tensor: str) -> str:
    """The call that turns a computed tensor into a parameter."""
    if parametrize.is_parametrized(module, tensor):
        return f"parametrize.remove_parametrizations(layer, {tensor!r})"
    if f"{tensor}_mask" in module._buffers:
        return f"prune.remove(layer, {tensor!r})"
    norm = "weight" if f"{tensor}_g" in module._parameters else "spectral"
    return f"remove_{norm}_norm(layer, {tensor!r})"
