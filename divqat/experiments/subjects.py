"""Turn run folders and ONNX files into the victims of an evaluation."""

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
from divqat.experiments.deploy import export_run, exported_file, verify_run
from divqat.export.verify import as_attacked
from divqat.train import Run, load_run
from divqat.train.folder import CHECKPOINT, read_checkpoint
from divqat.train.proxies import fit_misdirection
from divqat.victim.runners import SUFFIXES

INT8, FAKE, FLOAT, FILE = (
    "the exported int8 model in ONNX Runtime",
    "the fake-quantized model as trained",
    "the full-precision model",
    "the ONNX file in ONNX Runtime",
)


def deploy_run(run: Run, splits: Splits, *, name: str, fake_quant: bool = False) -> Subject:
    """The victim of a finished training, which is exported and verified if it was not yet.

    A full-precision run is attacked without export, and so is any run with ``fake_quant``.
    """
    method, seed, decoy = _method(run), run.config.seed, decoy_of(run, splits)
    if not run.config.kind.quantized or fake_quant:
        return Subject(name, run.model, method, seed, 1.0, gradients=run.model, decoy=decoy)
    export_run(run, splits)
    _, agreement = as_attacked(verify_run(run, splits))
    file = exported_file(run)
    return Subject(name, file, method, seed, agreement, gradients=run.model, decoy=decoy)


def decoy_of(run: Run, splits: Splits) -> Callable[[Tensor], Tensor] | None:
    """The decoy that a run was misdirected with, fitted at the first call; None: it has none."""
    config = run.config
    if config.rejects:
        classes = splits.num_classes
        return lambda images: images.new_full((len(images), classes), 1 / classes)
    if not config.misdirect or config.misdirect_target != "decoy":
        return None

    @functools.cache
    def fitted() -> nn.Module:
        loss = fit_misdirection(config, config.seed, splits.num_classes, splits.train)
        assert loss.targets.decoy is not None
        return loss.targets.decoy

    return lambda images: fitted()(images)


def _method(run: Run) -> str:
    """The method, prefixed by the teacher's if that is not ``fp``, so that it does not count as the
    undefended control."""
    teacher = run.config.teacher
    if teacher is None or not (Path(teacher) / CHECKPOINT).is_file():
        return run.config.method
    taught_by = read_checkpoint(Path(teacher))["config"]["method"]
    return run.config.method if taught_by == "fp" else f"{taught_by}-{run.config.method}"


def describe_deployment(run: Run, *, fake_quant: bool = False) -> str:
    """A description of what :func:`deploy_run` deploys, for a report."""
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
    """The victims given on a command line, their data, and a description of them for the report.

    Args:
        victims: ``PATH`` or ``NAME=PATH`` of run folders, or files of ONNX, ExecuTorch (``.pte``)
            or OpenVINO (``.xml``). Run folders with the same name are the seeds of one victim, each
            attacked with its own seed; a victim whose name occurs once is attacked with all seeds.
        dataset: the victims' data set, if no run folder names it.
        data_root: the folder of the data set.
        fake_quant: attack the fake-quantized models instead of their exports.

    Raises:
        ConfigError: the victims have different data sets, or an unknown one; or a victim's name
            cannot be the name of a folder.
        FileNotFoundError, ValueError: a file does not exist, or a run is not finished.
    """
    named = [_parse_victim(victim) for victim in victims]
    count = Counter(name for name, _ in named)
    runs = {path: load_run(path) for _, path in named if path.suffix not in SUFFIXES}
    data = {run.config.dataset for run in runs.values()} | ({dataset} if dataset else set())
    if len(data) != 1:
        got = sorted(data) or "none: pass --dataset, as no run folder names it"
        raise ConfigError(f"dataset: wanted one for all victims, got {got}")
    first = next(iter(runs.values()), None)
    splits = load(data.pop(), data_root=data_root) if first is None else first.splits(data_root)
    subjects, kinds = [], []
    for name, path in named:
        if path in runs:
            subject = deploy_run(runs[path], splits, name=name, fake_quant=fake_quant)
            kinds.append(describe_deployment(runs[path], fake_quant=fake_quant))
        else:
            subject = Subject(name, path)
            kinds.append(FILE)
        subjects.append(subject if count[name] > 1 else replace(subject, seed=None))
    return subjects, splits, "; ".join(dict.fromkeys(kinds))


def _parse_victim(victim: str) -> tuple[str, Path]:
    name, equals, path = victim.partition("=")
    if not equals:
        name, path = "", victim
    try:
        folder = check_folder("victim", path)
        return check_name("victim", name or folder.resolve().stem), folder
    except ValueError as error:
        raise ConfigError(str(error)) from None
