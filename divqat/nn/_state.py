"""Module state that survives versions, casts and copies, and loads from float checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VERSION = 2


class QuantState(nn.Module):
    """Mixin: stores the switches named in ``SWITCHES`` in versioned extra state, and loads
    checkpoints of float models.

    Extra state is an int64 tensor [version, switches, then :meth:`_grid`], because code that
    iterates over a state dict (weight averaging, safetensors) expects only tensors. In version 1 it
    was a dict.
    """

    SWITCHES: tuple[str, ...] = ()

    def _grid(self) -> tuple[int, ...]:
        """The ends of the grid, if the numbers of a checkpoint depend on it; else empty."""
        return ()

    def get_extra_state(self) -> Tensor:
        switches = (getattr(self, name) for name in self.SWITCHES)
        return torch.tensor([VERSION, *map(int, switches), *self._grid()], device="cpu")

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        old = isinstance(state, dict)
        version, *rest = (state.get("version"),) if isinstance(state, dict) else state.tolist()
        if version != (1 if old else VERSION):
            raise ValueError(
                f"{type(self).__name__}: wanted extra state of version {VERSION}, got {version}"
            )
        if isinstance(state, dict):
            rest = [*(state[name] for name in self.SWITCHES), *self._grid()]
        switches, grid = rest[: len(self.SWITCHES)], tuple(rest[len(self.SWITCHES) :])
        if grid != self._grid():
            raise ValueError(
                f"{type(self).__name__}: wanted a scale for codes {_ends(self._grid())}, got one "
                f"that was learned for {_ends(grid)}; prepare the model with the configuration of "
                "the checkpoint"
            )
        for name, value in zip(self.SWITCHES, switches, strict=True):
            setattr(self, name, bool(value))

    def _quant_keys(self) -> set[str]:
        """The keys of this module that a float checkpoint lacks."""
        return {"_extra_state"}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ours = {prefix + key for key in self._quant_keys()}
        if not ours & state_dict.keys():  # a float checkpoint; otherwise missing keys are errors
            missing_keys[:] = [key for key in missing_keys if key not in ours]


class QuantizerState(QuantState):
    """Mixin of the quantizers: their tensors keep their dtype when the model is cast (``.half()``,
    ``.double()``), and are reset when it leaves the meta device."""

    scale: Tensor | nn.Parameter

    def reset_parameters(self) -> None:
        """Reset everything that was observed or learned."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizerState:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        was_meta = self.scale.is_meta
        super()._apply(moved, recurse)
        if was_meta and not self.scale.is_meta:
            self.reset_parameters()
        return self


def _ends(grid: tuple[int, ...]) -> str:
    return " to ".join(map(str, grid))
