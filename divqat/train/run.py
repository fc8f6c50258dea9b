"""The training loop: seeded, resumable and shared by all methods."""

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
from divqat.train.calibration import calibrate
from divqat.train.checks import check_divergence
from divqat.train.collapse import collapse_warning
from divqat.train.config import TrainConfig
from divqat.train.distributed import World, connect, local_device
from divqat.train.folder import (
    CHECKPOINT,
    METRICS,
    SUMMARY,
    Run,
    check_same_settings,
    clean_up,
    load_run,
    load_splits,
    read_checkpoint,
    write_checkpoint,
)
from divqat.train.network import check_layer_bits, shape_of
from divqat.train.trainer import Trainer


def train(
    config: TrainConfig, out: str | Path, *, log: Callable[[str], object] = print
) -> dict[str, Any]:
    """Train into a run folder, or resume the training in it.

    Under torchrun, or if torch.distributed is initialized, the processes share the images of each
    step. Only rank 0 writes and logs. Every process needs the data set and the teacher's folder.
    The number of processes may change when a run is resumed.

    Writes ``config.yaml``, ``metrics.csv`` (a row per epoch) and ``checkpoint.pt`` (after every
    epoch) to ``out``, and at the end ``summary.json`` and ``plots/``. A run that is killed at any
    time and resumed gives the same bits as an uninterrupted one. The result is the model after the
    last epoch, or with ``accuracy_budget`` the one that :class:`divqat.train.budget.Budget`
    chooses. The test set is used once, at the end.

    Args:
        config: the settings.
        out: the run folder; created if it does not exist.
        log: is called with one line per epoch, and at the end with the warnings of the summary.

    Returns:
        The content of ``summary.json``.

    Raises:
        FileNotFoundError: the data set or the teacher was not found.
        ValueError: the folder holds a training with other settings or a damaged checkpoint, or
            the teacher or the reference does not match.
        WriteError: a file cannot be written, for example because the disk is full.
        FolderLost: ``out`` was deleted during the training.
        MemoryError: the batch does not fit; it says how many images would.
        FloatingPointError: NaN or Inf; it names epoch, step and cause. The checkpoint of the last
            complete epoch stays.
        ImportError: PyYAML, or the library of the optimizer, is missing.
    """
    require("yaml", "cli")
    # Naming a network of one's own trusts its code in the teacher and the reference as well.
    with (
        trust(*filter(is_foreign, [config.model])),
        connect(find_device(local_device(config.device))) as world,
    ):
        if world.rank:
            return _train(config, Path(out), _no_log, world)
        with held("out", out) as folder:
            return _train(config, folder, log, world)


def _no_log(line: str) -> None:
    pass


def _train(
    config: TrainConfig, out: Path, log: Callable[[str], object], world: World
) -> dict[str, Any]:
    config.check_world_size(world.size, world.device.type)  # before anything is written
    state, summary, is_main = None, None, world.rank == 0
    check_tree(out)
    if is_main and (out / CHECKPOINT).exists():
        state = read_checkpoint(out)
        check_same_settings(out, state["config"], config)
        if state["epoch"] == config.epochs and (out / SUMMARY).is_file():
            summary = read_json(out / SUMMARY)
    # Only rank 0 reads the folder: others may not see it, or may see what rank 0 wrote meanwhile.
    state, summary = world.broadcast((state, summary))
    teacher = None if config.teacher is None else _load_teacher(config)
    if state is not None and teacher is not None and state["teacher"] != teacher.fingerprint:
        raise ValueError(f"teacher: {config.teacher} has changed since {out} was started")
    if summary is not None:
        log(f"{out}: all {config.epochs} epochs are done")
        _log_warnings(summary, log)
        return summary

    splits = _load_checked_splits(config, log, thorough=is_main)
    if is_main:
        clean_up(out, [] if state is None else state["rows"])
        write_yaml(out / "config.yaml", config.to_dict())
    with cpu_threads(config.threads), _deterministic(config.deterministic):
        trainer = Trainer(config, splits, teacher, world, out)
        if state is None:
            if not config.epochs:
                trainer.measure_untrained()
            if config.calibrates:
                calibrate(trainer.model, config, trainer.train_set)
            if is_main:
                write_checkpoint(out, trainer.state())
        else:
            trainer.load(state)
            log(f"{out}: resuming after epoch {trainer.epoch} of {config.epochs}")
        while trainer.epoch < config.epochs:
            row = trainer.run_epoch()
            if is_main:
                write_checkpoint(out, trainer.state())
            log(_epoch_line(row, config.epochs))
            if trainer.epoch < row["epoch"] and trainer.budget is not None:
                log(trainer.budget.rewind_message(trainer.epoch))
        if trainer.budget is not None:
            log(trainer.budget.message())
        summary = _summary(trainer, splits)
    if is_main:
        _finish(config, summary, out, log)
    return summary


def _finish(
    config: TrainConfig, summary: dict[str, Any], out: Path, log: Callable[[str], object]
) -> None:
    """Write the plots and the summary, and log the result."""
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
        f"{summary['waiting']:.1%} of the training time waiting for images, "
        f"peak memory {_peak_memory_text(summary, config.teacher)}: {out}"
    )
    _log_warnings(summary, log)


def _load_checked_splits(
    config: TrainConfig, log: Callable[[str], object], *, thorough: bool
) -> Splits:
    """Load the data set and log warnings about it; ``thorough`` includes the slow checks."""
    splits = load_splits(config)
    check_divergence(config, splits.num_classes)
    check_layer_bits(config, shape_of(splits))
    for line in [*check_classes(splits), *(find_copies(splits) if thorough else [])]:
        log(f"warning: {line}")
    if isinstance(splits.train, StreamedSet):
        log(
            f"{len(splits.train)} training images, {splits.train.nbytes / 2**30:.1f} GiB, are "
            f"decoded on demand; worker processes: {splits.train.decoder.workers}"
        )
    return splits


def _summary(trainer: Trainer, splits: Splits) -> dict[str, Any]:
    """The content of ``summary.json``, which includes the test accuracy."""
    config, budget = trainer.config, trainer.budget
    last = trainer.rows[-1] if budget is None else budget.chosen
    logits = predict(trainer.model.eval(), splits.test)
    frozen_from = config.freeze_epoch("batchnorm") if config.kind.quantized else inf
    result = last["validation_accuracy"]
    collapsed = collapse_warning(trainer.rows, result, frozen_from, never=config.epochs + 1)
    warnings = [collapsed, None if budget is None else budget.warning()]
    discarded = 0.0 if budget is None else sum(attempt["seconds"] for attempt in budget.attempts)
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
        "seconds": discarded + sum(row["seconds"] for row in trainer.rows),
        "ms_per_step": mean(row["ms_per_step"] for row in trainer.rows),
        "waiting": mean(row.get("waiting", 0.0) for row in trainer.rows),  # fraction
        "peak_memory": peak_memory(trainer.device),  # bytes, of rank 0
        "budget": None if budget is None else budget.summary(),
        "warnings": [warning for warning in warnings if warning is not None],
        "versions": versions(),
        "hardware": hardware(),
    }


def _log_warnings(summary: dict[str, Any], log: Callable[[str], object]) -> None:
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
    for name in config.shared:
        wanted, got = getattr(teacher.config, name), getattr(config, name)
        if wanted != got and name != "data_root":
            raise ValueError(f"{name}: wanted {wanted} as in {config.teacher}, got {got}")
    return teacher


def _peak_memory_text(summary: dict[str, Any], teacher: str | None) -> str:
    """The peak memory, and in parentheses that of the teacher's training."""
    text = _megabytes(summary["peak_memory"])
    if teacher is not None and (Path(teacher) / SUMMARY).is_file():
        teacher_peak = read_json(Path(teacher) / SUMMARY).get("peak_memory")
        text += f" (full precision: {_megabytes(teacher_peak)})"
    return text


def _megabytes(nbytes: int | None) -> str:
    return "not measured" if nbytes is None else f"{nbytes / 2**20:.0f} MB"


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
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
    if wanted:  # cuBLAS reads this when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
