"""Where an attack keeps what it has done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from divqat._util.files import load_checkpoint, save_checkpoint
from divqat._util.names import check_folder


class Folder:
    """Checkpoints with the settings that they belong to beside them.

    Args:
        path: the folder; None keeps nothing.
        settings: plain data; a checkpoint of other settings is refused.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else check_folder("resume_dir", path)
        self.settings = settings

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep ``state`` (plain data and tensors) under ``name``, atomically."""
        if self.path is not None:
            save_checkpoint(self.path / name, {"settings": self.settings, **state})

    def load(self, name: str) -> dict[str, Any] | None:
        """What was kept under ``name``; None when nothing was.

        Raises:
            ValueError: it belongs to other settings, or is damaged.
        """
        if self.path is None or not (self.path / name).exists():
            return None
        state = load_checkpoint(self.path / name)
        there = state.get("settings", {})
        for key, here in self.settings.items():
            if there.get(key) != here:
                raise ValueError(
                    f"resume_dir: {self.path / name} belongs to other settings: "
                    f"{key} is {there.get(key)} there, {here} here"
                )
        return state

    def within(self, name: str) -> Path | None:
        """The path of a folder inside it, for a part that keeps its own checkpoints."""
        return None if self.path is None else self.path / name
