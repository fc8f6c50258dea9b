"""The run folder of a training: its files, their checks, and loading the model back."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from divqat._util.bounds import check_tree
from divqat._util.devices import fingerprint
from divqat._util.files import load_checkpoint, save_checkpoint, write_text
from divqat._util.settings import differences
from divqat.data import Splits, load
from divqat.train.config import TrainConfig
from divqat.train.network import build_model, check_size, example_input
from divqat.train.settings import DataSettings

CHECKPOINT, METRICS, SUMMARY = "checkpoint.pt", "metrics.csv", "summary.json"
# Settings that may differ when a run resumes: where files are and what it runs on. Whether the
# teacher and the reference are the same is checked by the fingerprints of their weights.
MAY_DIFFER = ("device", "data_root", "stream", "workers", "teacher", "reference", "members")


FIELD_TYPES = {
    "config": dict,
    "shape": dict,
    "epoch": int,
    "model": dict,
    "rows": list,
}  # of a checkpoint


@dataclass(frozen=True)
class Run:
    """A training that has been loaded from its folder."""

    folder: Path
    config: TrainConfig
    model: nn.Module  # float or prepared, in eval mode, on the CPU
    epoch: int  # epochs completed
    shape: dict[str, Any]  # in_channels, num_classes, image_size
    teacher: str | None  # the teacher's fingerprint
    fingerprint: str  # of the weights in the checkpoint

    @property
    def example(self) -> Tensor:
        """float32 zeros [2, C, H, W] in the model's input shape."""
        return example_input(self.shape)

    def splits(self, data_root: str | None = None) -> Splits:
        """The data set of the run, decoded by the default number of workers of this machine."""
        return load_splits(replace(self.config, workers=None), data_root)


def load_run(folder: str | Path) -> Run:
    """Load a finished training.

    Raises:
        FileNotFoundError: no checkpoint in ``folder``.
        ValueError: the checkpoint is damaged or the training unfinished.
        ConfigError: the run names code that is not trusted, see :func:`divqat.trust`.
    """
    folder = Path(folder)
    state = read_checkpoint(folder)
    config = TrainConfig.from_dict(state["config"], where=str(folder / CHECKPOINT))
    if state["epoch"] < config.epochs:
        raise ValueError(
            f"{folder} has done {state['epoch']} of {config.epochs} epochs: "
            f"divqat train --out {folder} --resume"
        )
    model = restore(config, state, folder / CHECKPOINT)
    rest = state["epoch"], state["shape"], state["teacher"], fingerprint(state["model"])
    return Run(folder, config, model, *rest)


def restore(config: TrainConfig, state: Mapping[str, Any], path: Path) -> nn.Module:
    """The network of a checkpoint's ``shape`` and ``model``, in eval mode, on the CPU.

    Raises:
        ValueError: the weights do not fit the shape; see :func:`divqat.train.network.check_size`.
    """
    check_size(config.model, state["shape"], state["model"], path)
    model = build_model(config, state["shape"])
    model.load_state_dict(state["model"])
    return model.eval()


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run folder, on the CPU.

    Raises:
        FileNotFoundError: no checkpoint. ValueError: it is damaged, or not from a training.
    """
    if not (folder / CHECKPOINT).is_file():
        raise FileNotFoundError(f"no training at {folder}: there is no {CHECKPOINT}")
    check_tree(folder)
    state = load_checkpoint(folder / CHECKPOINT)
    missing = {"config", "shape", "epoch", "model", "optimizer", "rows", "teacher"} - state.keys()
    if missing:
        raise ValueError(
            f"{folder / CHECKPOINT} is not from a training: no {', '.join(sorted(missing))}"
        )
    for key, kind in FIELD_TYPES.items():
        if not isinstance(state[key], kind):
            got = type(state[key]).__name__
            raise ValueError(f"{folder / CHECKPOINT} is not from a training: {key} is a {got}")
    # Checkpoints from before these settings existed: today's defaults differ from what the run did.
    state["config"].setdefault("distill", 0.0)
    state["config"].setdefault("first_last_bits", 8)
    return state


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint, then ``metrics.csv`` from its rows."""
    save_checkpoint(folder / CHECKPOINT, state)
    _write_metrics(folder, state["rows"])


def clean_up(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Repair what a killed process left behind: write ``rows``, those of the checkpoint, to
    ``metrics.csv``, and remove the summary of an earlier training."""
    (folder / SUMMARY).unlink(missing_ok=True)
    _write_metrics(folder, rows)


def _write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / METRICS, text.getvalue())


def check_same_settings(folder: Path, stored: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse, by ValueError, to resume a checkpoint with other settings; those may differ that have
    no effect in either training."""
    # TrainConfig.from_dict adds the defaults of settings newer than the checkpoint.
    configs = (TrainConfig.from_dict(stored, where=str(folder / CHECKPOINT)), config)
    ignored = {*MAY_DIFFER} | (configs[0].unused & configs[1].unused)
    pair = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in configs)
    different = differences(*pair)
    if different:
        raise ValueError(
            f"{folder} holds a training with other settings ({'; '.join(different)}): "
            "keep these settings, choose another --out, or delete it"
        )


def load_splits(settings: DataSettings, data_root: str | None = None) -> Splits:
    """The data set of a training.

    Raises:
        ValueError: ``validation_fraction`` leaves no validation images.
        Others: as :func:`divqat.data.load`.
    """
    splits = load(
        settings.dataset,
        data_root=data_root or settings.data_root,
        validation_fraction=settings.validation_fraction,
        image_size=settings.image_size,
        stream=settings.stream,
        workers=settings.workers,
    )
    if not len(splits.validation):
        raise ValueError(
            "validation_fraction: wanted one that leaves images to validate on, got "
            f"{settings.validation_fraction:g}, which is none of {len(splits.train)} images"
        )
    return splits
