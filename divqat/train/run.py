"""The training loop: seeded, resumable, and the same for all methods."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from divqat._util.bounds import check_tree
from divqat._util.devices import cpu_threads, find_device, hardware, versions
from divqat._util.errors import require
from divqat._util.files import read_json, sha256, write_json
from divqat._util.foreign import is_foreign, trust
from divqat._util.held import held
from divqat._util.memory import peak_memory
from divqat._util.settings import write_yaml
from divqat._util.text import printable
from divqat.data import Splits, StreamedSet
from divqat.data.checks import check_classes, find_copies
from divqat.evaluate.curves import budget_path, training_curves
from divqat.metrics import accuracy, mean_top_probability, predict, softmax
from divqat.train.checks import check_divergence
from divqat.train.collapse import collapse
from divqat.train.config import SHARED, TrainConfig
from divqat.train.distributed import Team, connect, local_device
from divqat.train.folder import (
    CHECKPOINT,
    METRICS,
    SUMMARY,
    Run,
    check_same,
    clean_up,
    load_run,
    load_splits,
    read_checkpoint,
    write_checkpoint,
)
from divqat.train.trainer import Trainer


def train(
    config: TrainConfig, out: str | Path, *, log: Callable[[str], object] = print
) -> dict[str, Any]:
    """Train into a run folder, or go on with the training that is there.

    Under torchrun, or where torch.distributed is initialized, the processes do the steps of one
    together; process 0 alone writes and logs, and how many there are may change when a run goes
    on. Each needs the data set and the teacher's folder.

    ``out`` gets ``config.yaml``, ``metrics.csv`` (a row per epoch), ``checkpoint.pt`` (after every
    epoch), and at the end ``summary.json`` and ``plots/``. A run that was killed at any moment and
    started again ends with the same bits as one that was not. The model of the last epoch is the
    result, or with ``accuracy_budget`` what :class:`divqat.train.budget.Budget` chooses; the test
    set is looked at once, at the end.

    Args:
        config: the settings.
        out: the run folder; made if it does not exist.
        log: takes one line per epoch, and at the end the warnings of the summary.

    Returns:
        The content of ``summary.json``.

    Raises:
        FileNotFoundError: the data set or the teacher is not there.
        ValueError: the folder holds a training with other settings or a damaged checkpoint, or
            the teacher or the reference does not fit.
        WriteError: a file cannot be written, as the disk is full. FolderLost: ``out`` was deleted.
        MemoryError: the batch does not fit; it says how many images would.
        FloatingPointError: NaN or Inf; it names epoch, step and cause. The last epoch's
            checkpoint stays.
        ImportError: PyYAML is missing.
    """
    require("yaml", "cli")
    # Who trains a network of theirs means it in its teacher and its reference, too.
    with (
        trust(*filter(is_foreign, [config.model])),
        connect(find_device(local_device(config.device))) as team,
    ):
        if team.rank:
            return _train(config, Path(out), _no_log, team)
        with held("out", out) as folder:  # by the process that writes
            return _train(config, folder, log, team)


def _no_log(line: str) -> None:
    pass


def _train(
    config: TrainConfig, out: Path, log: Callable[[str], object], team: Team
) -> dict[str, Any]:
    config.check_team(team.size, team.device.type)  # before anything is written
    state, summary, writes = None, None, team.rank == 0
    check_tree(out)
    if writes and (out / CHECKPOINT).exists():
        state = read_checkpoint(out)
        check_same(out, state["config"], config)
        if state["epoch"] == config.epochs and (out / SUMMARY).is_file():
            summary = read_json(out / SUMMARY)
    # Not all read the folder: process 0 may have written to it already, or be the one that has it.
    state, summary = team.broadcast((state, summary))
    teacher = None if config.teacher is None else _load_teacher(config)
    if state is not None and teacher is not None and state["teacher"] != teacher.fingerprint:
        raise ValueError(f"teacher: {config.teacher} has changed since {out} was begun")
    if summary is not None:
        log(f"{out}: all {config.epochs} epochs are done")
        _warn(summary, log)
        return summary

    splits = _checked_splits(config, writes, log)
    if writes:
        clean_up(out, [] if state is None else state["rows"])
        write_yaml(out / "config.yaml", config.to_dict())
    with cpu_threads(config.threads), _deterministic(config.deterministic):
        trainer = Trainer(config, splits, teacher, team, out)
        if state is None:
            if not config.epochs:
                trainer.measure_untrained()
            if writes:
                write_checkpoint(out, trainer.state())
        else:
            trainer.load(state)
            log(f"{out}: going on after epoch {trainer.epoch} of {config.epochs}")
        while trainer.epoch < config.epochs:
            row = trainer.run_epoch()
            if writes:
                write_checkpoint(out, trainer.state())
            log(_line(row, config.epochs))
            if trainer.epoch < row["epoch"] and trainer.budget is not None:
                log(trainer.budget.again(trainer.epoch))
        if trainer.budget is not None:
            log(trainer.budget.line())
        summary = _summary(trainer, splits)
    if writes:
        _finish(config, summary, out, log)
    return summary


def _finish(
    config: TrainConfig, summary: dict[str, Any], out: Path, log: Callable[[str], object]
) -> None:
    """Write the plots and the summary."""
    try:
        training_curves({printable(out.name): [out / METRICS]}, out / "plots" / "training.png")
        if summary["budget"] is not None:
            budget_path(summary["budget"], out / "plots" / "budget.png")
    except ImportError as error:
        log(f"no plots: {error}")
    summary["sha256"] = {METRICS: sha256(out / METRICS)}
    write_json(out / SUMMARY, summary)
    log(
        f"test accuracy {summary['test_accuracy']:.2%} in {summary['seconds']:.0f} s, "
        f"{summary['waiting']:.1%} of the steps' time waiting for images, "
        f"peak memory {_peak(summary, config.teacher)}: {out}"
    )
    _warn(summary, log)


def _checked_splits(config: TrainConfig, alone: bool, log: Callable[[str], object]) -> Splits:
    """The data set, and lines about what is odd in it; ``alone``: also those that take long."""
    splits = load_splits(config)
    check_divergence(config, splits.num_classes)
    for line in [*check_classes(splits), *(find_copies(splits) if alone else [])]:
        log(f"warning: {line}")
    if isinstance(splits.train, StreamedSet):
        log(
            f"{len(splits.train)} training images, {splits.train.nbytes / 2**30:.1f} GiB, are "
            f"decoded as they are needed; worker processes: {splits.train.decoder.workers}"
        )
    return splits


def _summary(trainer: Trainer, splits: Splits) -> dict[str, Any]:
    """The content of ``summary.json``; looks at the test set."""
    config, budget = trainer.config, trainer.budget
    last = trainer.rows[-1] if budget is None else budget.chosen
    logits = predict(trainer.model.eval(), splits.test)
    frozen_from = config.first_frozen("batchnorm") if config.kind.quantized else inf
    result = last["validation_accuracy"]
    broken = collapse(trainer.rows, result, frozen_from, never=config.epochs + 1)
    warnings = [broken, None if budget is None else budget.warning()]
    lost = 0.0 if budget is None else sum(attempt["seconds"] for attempt in budget.attempts)
    return {
        "method": config.method,
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "epochs": config.epochs,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation_accuracy": last["validation_accuracy"],
        "test_accuracy": accuracy(logits, splits.test.labels),
        "test_top_probability": mean_top_probability(softmax(logits)),
        "seconds": lost + sum(row["seconds"] for row in trainer.rows),
        "ms_per_step": mean(row["ms_per_step"] for row in trainer.rows),
        "waiting": mean(row.get("waiting", 0.0) for row in trainer.rows),  # share of the steps
        "peak_memory": peak_memory(trainer.device),  # bytes, of process 0
        "budget": None if budget is None else budget.summary(),
        "warnings": [warning for warning in warnings if warning is not None],
        "versions": versions(),
        "hardware": hardware(),
    }


def _warn(summary: dict[str, Any], log: Callable[[str], object]) -> None:
    for warning in summary.get("warnings", []):
        log(f"warning: {printable(warning)}")


def _load_teacher(config: TrainConfig) -> Run:
    assert config.teacher is not None
    teacher = load_run(config.teacher)
    if teacher.config.kind.quantized:
        raise ValueError(
            f"teacher: wanted a full-precision training, got method {teacher.config.method} in "
            f"{config.teacher}"
        )
    for name in SHARED:
        there, here = getattr(teacher.config, name), getattr(config, name)
        if there != here and name != "data_root":
            raise ValueError(f"{name}: wanted {there} as in {config.teacher}, got {here}")
    return teacher


def _peak(summary: dict[str, Any], teacher: str | None) -> str:
    """The peak memory, beside that of the full-precision training."""
    text = _megabytes(summary["peak_memory"])
    if teacher is not None and (Path(teacher) / SUMMARY).is_file():
        before = read_json(Path(teacher) / SUMMARY).get("peak_memory")
        text += f" (full precision: {_megabytes(before)})"
    return text


def _megabytes(nbytes: int | None) -> str:
    return "not measured" if nbytes is None else f"{nbytes / 2**20:.0f} MB"


def _line(row: dict[str, Any], epochs: int) -> str:
    divergence = "" if row["divergence"] is None else f"  divergence {row['divergence']:.4f}"
    if "misled" in row:
        divergence += f"  proxies misled {row['misled']:.1%}"
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['loss']:.4f}  "
        f"ce {row['ce']:.4f}{divergence}  val acc {row['validation_accuracy']:6.2%}  "
        f"top prob {row['top_probability']:.3f}  lr {row['lr']:.2g}  "
        f"{row['ms_per_step']:.1f} ms/step"
    )


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:  # cuBLAS wants it said in this way, before its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
