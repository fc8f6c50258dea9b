"""What prepare and convert refuse: arguments in the wrong place, weights that are computed."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from divqat.nn._layer import QuantLayer
from divqat.nn.fake_quantize import FakeQuantize
from divqat.quantize.config import QuantConfig
from divqat.quantize.deployed import IntegerLayer


def check_types(model: object, config: object, example_input: object) -> None:
    """Refuse arguments of :func:`divqat.prepare` in the wrong place, by TypeError."""
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
            "example_input: wanted a batch as the model takes it, got "
            f"{type(example_input).__name__}{order}"
        )


def check_is_float(model: nn.Module) -> None:
    """Refuse a model that is prepared or converted, by ValueError."""
    if any(isinstance(module, IntegerLayer) for module in model.modules()):
        raise ValueError("model: wanted a float model, got one that is converted already")
    if any(isinstance(module, (QuantLayer, FakeQuantize)) for module in model.modules()):
        raise ValueError("model: wanted a float model, got one that is prepared already")


def check_is_prepared(name: str, model: nn.Module, kinds: tuple[type, ...] = (QuantLayer,)) -> None:
    """Refuse a model that is converted, or has no module of ``kinds``, by ValueError."""
    wanted = f"{name}: wanted a model made by divqat.prepare, got"
    if any(isinstance(module, IntegerLayer) for module in model.modules()):
        raise ValueError(f"{wanted} one that is converted already")
    if not any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(f"{wanted} no quantized layer")


def check_parameters(name: str, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse, by ValueError, layers whose weight or bias is not a parameter of its own.

    One that a hook computes is as old as the last forward pass, and none of them can be folded.

    Args:
        name: of the argument. layers: with their names.
    """
    for path, layer in layers:
        for tensor in ("weight", "bias"):
            if tensor in layer._parameters or not isinstance(getattr(layer, tensor), Tensor):
                continue
            raise ValueError(
                f"{name}: wanted plain parameters, got a {tensor} of {path!r} that is computed "
                "from others (pruned, weight-normed ...); make it one first, by "
                f"torch.nn.utils.{_remedy(layer, tensor)}"
            )


def copied(name: str, model: nn.Module) -> nn.Module:
    """A deep copy, or the reason why there is none as a ValueError."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a module of the user's own raises
        raise ValueError(
            f"{name}: wanted a model that copy.deepcopy copies, got {type(error).__name__}: {error}"
        ) from error


def _remedy(module: nn.Module, tensor: str) -> str:
    """The call that makes a computed tensor a parameter."""
    if parametrize.is_parametrized(module, tensor):
        return f"parametrize.remove_parametrizations(layer, {tensor!r})"
    if f"{tensor}_mask" in module._buffers:
        return f"prune.remove(layer, {tensor!r})"
    kind = "weight" if f"{tensor}_g" in module._parameters else "spectral"
    return f"remove_{kind}_norm(layer, {tensor!r})"
