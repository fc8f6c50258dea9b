"""Modules and tensors by their path in a model."""

from __future__ import annotations

from typing import Any

from torch import nn


class ByMode(nn.Module):
    """An argument that depends on the mode."""

    def __init__(self, evaluating: Any, training: Any) -> None:
        super().__init__()
        self.values = evaluating, training

    def forward(self) -> Any:
        """The value of the present mode."""
        return self.values[self.training]


def add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module at a path, and plain modules above it where there are none."""
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(name, module)


def get_tensor(root: nn.Module, path: str) -> Any:
    """The parameter or buffer at a path."""
    prefix, _, name = path.rpartition(".")
    holder = root.get_submodule(prefix)
    return holder._parameters.get(name, holder._buffers.get(name))
