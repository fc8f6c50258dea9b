"""Inputs and outputs of the layers of a clone, which the attacker owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

Activations = dict[str, tuple[Tensor, Tensor]]  # by the name of a layer: input and output


def trace(clone: nn.Module, names: Iterable[str], images: Tensor) -> tuple[Tensor, Activations]:
    """One forward pass: the logits, and the activations of the named layers in the order of their
    calls.

    All hooks are removed, so that the clone can be copied and stored.
    """
    activations: Activations = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            activations[name] = (inputs[0], output)

        return hook

    hooks = [clone.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    try:
        return clone(images), activations
    finally:
        for hook in hooks:
            hook.remove()
