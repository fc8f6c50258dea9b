"""The folder of one training: what is in it, how it is checked, how its model comes back."""

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
from divqat.train.network import build_model, check_size, example
from divqat.train.settings import DataSettings

CHECKPOINT, METRICS, SUMMARY = "checkpoint.pt", "metrics.csv", "summary.json"
# Where something lies or runs, not what it is: a run may go on with other values. That the teacher
# is the same is seen from its weights; what the reference was is in the checkpoint.
FREE = ("device", "data_root", "stream", "workers", "teacher", "reference")


KINDS = {"config": dict, "shape": dict, "epoch": int, "model": dict, "rows": list}  # of its parts


@dataclass(frozen=True)
class Run:
    """A training that has been loaded from its folder."""

    folder: Path
    config: TrainConfig
    model: nn.Module  # float or prepared, in eval mode, on the CPU
    epoch: int  # epochs done
    shape: dict[str, Any]  # in_channels, num_classes, image_size
    teacher: str | None  # its fingerprint, if it had one
    fingerprint: str  # what identifies the weights, as they were written

    @property
    def example(self) -> Tensor:
        """A float32 batch of the model's input shape."""
        return example(self.shape)

    def splits(self, data_root: str | None = None) -> Splits:
        """The data set that the run learned, decoded by as many processes as is usual here."""
        return load_splits(replace(self.config, workers=None), data_root)


def load_run(folder: str | Path) -> Run:
    """Load a finished training.

    Raises:
        FileNotFoundError: no checkpoint there. ValueError: a damaged one, or not finished.
        ConfigError: it names code that nobody trusts, see :func:`divqat.trust`.
    """
    folder = Path(folder)
    state = read_checkpoint(folder)
    config = TrainConfig.from_dict(state["config"], where=str(folder / CHECKPOINT))
    if state["epoch"] < config.epochs:
        raise ValueError(
            f"{folder} has done {state['epoch']} of {config.epochs} epochs: "
            f"divqat train --out {folder} --resume"
        )
    check_size(config.model, state["shape"], state["model"], folder / CHECKPOINT)
    model = build_model(config, state["shape"])
    model.load_state_dict(state["model"])
    rest = state["epoch"], state["shape"], state["teacher"], fingerprint(state["model"])
    return Run(folder, config, model.eval(), *rest)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run folder, on the CPU.

    Raises:
        FileNotFoundError: none there. ValueError: it is damaged, or not one of a training.
    """
    if not (folder / CHECKPOINT).is_file():
        raise FileNotFoundError(f"no training at {folder}: there is no {CHECKPOINT}")
    check_tree(folder)
    state = load_checkpoint(folder / CHECKPOINT)
    missing = {"config", "shape", "epoch", "model", "optimizer", "rows", "teacher"} - state.keys()
    if missing:
        raise ValueError(
            f"{folder / CHECKPOINT} is not of a training: no {', '.join(sorted(missing))}"
        )
    for key, kind in KINDS.items():
        if not isinstance(state[key], kind):
            got = type(state[key]).__name__
            raise ValueError(f"{folder / CHECKPOINT} is not of a training: {key} is a {got}")
    # From before these existed: their defaults would be another loss or grid than the run had.
    state["config"].setdefault("distill", 0.0)
    state["config"].setdefault("first_last_bits", 8)
    return state


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint, then ``metrics.csv`` from its rows."""
    save_checkpoint(folder / CHECKPOINT, state)
    _write_metrics(folder, state["rows"])


def clean_up(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Undo what a kill left behind: metrics that lack the last of ``rows``, those of the
    checkpoint; and remove the summary of a training that was here before."""
    (folder / SUMMARY).unlink(missing_ok=True)
    _write_metrics(folder, rows)


def _write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / METRICS, text.getvalue())


def check_same(folder: Path, there: Mapping[str, Any], here: TrainConfig) -> None:
    """Refuse a run folder whose checkpoint has other settings that matter to either training."""
    # Through TrainConfig: a checkpoint from before a setting existed has its default.
    configs = (TrainConfig.from_dict(there, where=str(folder / CHECKPOINT)), here)
    left_out = {*FREE} | (configs[0].idle & configs[1].idle)
    pair = ({k: v for k, v in c.to_dict().items() if k not in left_out} for c in configs)
    different = differences(*pair)
    if different:
        raise ValueError(
            f"{folder} holds a training with other settings ({'; '.join(different)}): "
            "give these settings as they were, choose another --out, or delete it"
        )


def load_splits(settings: DataSettings, data_root: str | None = None) -> Splits:
    """The data set of a training.

    Raises:
        ValueError: ``validation_fraction`` leaves nothing to validate on.
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
            "validation_fraction: wanted one that keeps images aside to validate on, got "
            f"{settings.validation_fraction:g}, of {len(splits.train)} images none"
        )
    return splits
