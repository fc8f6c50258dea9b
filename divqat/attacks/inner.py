"""Look inside a clone: it is the attacker's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

Seen = dict[str, tuple[Tensor, Tensor]]  # by the name of a layer: what came in, what went out


def trace(clone: nn.Module, names: Iterable[str], images: Tensor) -> tuple[Tensor, Seen]:
    """One forward pass: the logits, and what the named layers saw, in the order of their calls.

    The clone is left without hooks, so that it can be copied and stored.
    """
    seen: Seen = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0], output)

        return hook

    hooks = [clone.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        return clone(images), seen
    finally:
        for hook in hooks:
            hook.remove()
