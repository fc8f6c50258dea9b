"""From run folders and ONNX files to the victims of an evaluation."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from divqat._util.names import check_folder, check_name
from divqat._util.settings import ConfigError
from divqat.data import Splits, load
from divqat.evaluate import Subject
from divqat.experiments.deploy import export_run, exported, verify_run
from divqat.export.verify import as_attacked
from divqat.train import Run, load_run
from divqat.train.folder import CHECKPOINT, read_checkpoint
from divqat.train.proxies import fitted_misdirection

INT8, FAKE, FLOAT, FILE = (
    "the exported int8 model in ONNX Runtime",
    "the fake-quantized model as trained",
    "the full-precision model",
    "the ONNX file in ONNX Runtime",
)


def subject_of(run: Run, splits: Splits, *, name: str, fake_quant: bool = False) -> Subject:
    """A finished training as it is deployed: exported and verified first where it was not.

    A full-precision run is attacked as it is, and so is any with ``fake_quant``.
    """
    method, seed, decoy = _method(run), run.config.seed, decoy_of(run, splits)
    if not run.config.kind.quantized or fake_quant:
        return Subject(name, run.model, method, seed, 1.0, gradients=run.model, decoy=decoy)
    export_run(run, splits)
    _, agreement = as_attacked(verify_run(run, splits))
    return Subject(name, exported(run), method, seed, agreement, gradients=run.model, decoy=decoy)


def decoy_of(run: Run, splits: Splits) -> Callable[[Tensor], Tensor] | None:
    """The decoy that a run was misdirected with, which is fitted when it is first asked; None: it
    has none."""
    config = run.config
    if not config.misdirect or config.misdirect_target != "decoy":
        return None

    @functools.cache
    def fitted() -> nn.Module:
        loss = fitted_misdirection(config, config.seed, splits.num_classes, splits.train)
        assert loss.targets.decoy is not None
        return loss.targets.decoy

    return lambda images: fitted()(images)


def _method(run: Run) -> str:
    """The method; that of a model made from a defended teacher says so: it is not the control."""
    teacher = run.config.teacher
    if teacher is None or not (Path(teacher) / CHECKPOINT).is_file():
        return run.config.method
    before = read_checkpoint(Path(teacher))["config"]["method"]
    return run.config.method if before == "fp" else f"{before}-{run.config.method}"


def kind_of(run: Run, *, fake_quant: bool = False) -> str:
    """What :func:`subject_of` deploys, for a report."""
    if not run.config.kind.quantized:
        return FLOAT
    return FAKE if fake_quant else INT8


def load_subjects(
    victims: Sequence[str],
    *,
    dataset: str | None = None,
    data_root: str | None = None,
    fake_quant: bool = False,
) -> tuple[list[Subject], Splits, str]:
    """The victims that a command line names, their data, and what they are.

    Args:
        victims: ``PATH`` or ``NAME=PATH`` of run folders or ONNX files. Run folders of one name are
            taken for the seeds of one victim, and each is attacked with its own; else every victim
            is attacked with all seeds.
        dataset: what the victims learned, where no run folder tells.
        data_root: the folder of the data set.
        fake_quant: attack runs as they were trained.

    Raises:
        ConfigError: victims of different data sets, or none that is known; a name that cannot be
            that of a folder.
        FileNotFoundError, ValueError: no such file, no finished run.
    """
    named = [_name(victim) for victim in victims]
    count = Counter(name for name, _ in named)
    runs = {path: load_run(path) for _, path in named if path.suffix != ".onnx"}
    data = {run.config.dataset for run in runs.values()} | ({dataset} if dataset else set())
    if len(data) != 1:
        got = sorted(data) or "none, and no run folder tells: pass --dataset"
        raise ConfigError(f"dataset: wanted one for all victims, got {got}")
    first = next(iter(runs.values()), None)
    splits = load(data.pop(), data_root=data_root) if first is None else first.splits(data_root)
    subjects, kinds = [], []
    for name, path in named:
        if path in runs:
            subject = subject_of(runs[path], splits, name=name, fake_quant=fake_quant)
            kinds.append(kind_of(runs[path], fake_quant=fake_quant))
        else:
            subject = Subject(name, path)
            kinds.append(FILE)
        subjects.append(subject if count[name] > 1 else replace(subject, seed=None))
    return subjects, splits, "; ".join(dict.fromkeys(kinds))


def _name(victim: str) -> tuple[str, Path]:
    name, equals, path = victim.partition("=")
    if not equals:
        name, path = "", victim
    try:
        folder = check_folder("victim", path)
        return check_name("victim", name or folder.resolve().stem), folder
    except ValueError as error:
        raise ConfigError(str(error)) from None
