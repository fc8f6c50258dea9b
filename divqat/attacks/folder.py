"""The folder in which an attack stores its progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from divqat._util.files import load_checkpoint, save_checkpoint
from divqat._util.names import check_folder


class Folder:
    """A folder of checkpoints, each with the settings that it belongs to.

    Args:
        path: the folder; None stores nothing.
        settings: plain data; checkpoints of other settings are refused.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else check_folder("resume_dir", path)
        self.settings = settings

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Store ``state`` (plain data and tensors) under ``name``, atomically."""
        if self.path is not None:
            save_checkpoint(self.path / name, {"settings": self.settings, **state})

    def load(self, name: str) -> dict[str, Any] | None:
        """The state stored under ``name``; None if there is none.

        Raises:
            ValueError: it belongs to other settings, or is damaged.
        """
        if self.path is None or not (self.path / name).exists():
            return None
        state = load_checkpoint(self.path / name)
        stored = state.get("settings", {})
        for key, value in self.settings.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"resume_dir: {self.path / name} belongs to other settings: "
                    f"{key} is {stored.get(key)} there, {value} here"
                )
        return state

    def path_of(self, name: str) -> Path | None:
        """The path of ``name`` in the folder; None if nothing is stored."""
        return None if self.path is None else self.path / name
