"""State dicts that outlive versions: extra state of plain numbers, float checkpoints welcome."""

from __future__ import annotations

from typing import Any

from torch import nn

VERSION = 1


class QuantState(nn.Module):
    """Mixin: the switches named in ``SWITCHES`` travel in versioned extra state, and a checkpoint
    that knows nothing of quantization loads without complaint."""

    SWITCHES: tuple[str, ...] = ()

    def get_extra_state(self) -> dict[str, Any]:
        return {"version": VERSION, **{name: getattr(self, name) for name in self.SWITCHES}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state.get("version") != VERSION:
            raise ValueError(
                f"{type(self).__name__}: wanted extra state of version {VERSION}, "
                f"got {state.get('version')}"
            )
        for name in self.SWITCHES:
            setattr(self, name, state[name])

    def _quant_keys(self) -> set[str]:
        """The keys of this module's own that a float checkpoint lacks."""
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
        if not ours & state_dict.keys():  # a float checkpoint; otherwise a gap is an error
            missing_keys[:] = [key for key in missing_keys if key not in ours]
