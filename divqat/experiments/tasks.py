"""The tasks of a study: trainings, and the parts of each victim's evaluation."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from divqat._util.devices import cpu_threads
from divqat._util.held import held
from divqat.data import Splits
from divqat.evaluate.assessment import Assessment, Context
from divqat.experiments.study import Study
from divqat.experiments.subjects import deploy_run
from divqat.experiments.workers import Task
from divqat.train import load_run, train
from divqat.train.folder import load_splits

Log = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class _StudyRun:
    """One run of a study.

    Attributes:
        study: the settings.
        out: the folder of the study.
        token: identifies this run; a worker caches by it what it has loaded.
    """

    study: Study
    out: Path
    token: str

    def __hash__(self) -> int:
        return hash(self.token)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StudyRun) and self.token == other.token


def study_tasks(study: Study, queries: int, out: Path) -> list[Task]:
    """All tasks of a study, each after those whose results it reads.

    Args:
        study: the settings.
        queries: size of the query set.
        out: the absolute path of the study's folder.
    """
    job = _StudyRun(study, out, secrets.token_hex(8))
    return [task for seed in study.seeds for task in _seed_tasks(job, queries, seed)]


def _seed_tasks(job: _StudyRun, queries: int, seed: int) -> Iterator[Task]:
    study = job.study
    for name in study.names:
        needs = tuple(f"seed {seed} {other}" for other in study.needs(name))
        yield Task(f"seed {seed} {name}", _train, (job, seed, name), needs)
    for name in study.evaluated:
        victim, where = f"seed {seed} {name}", (job, seed, name)
        yield Task(f"{victim}: side effects", _side_effects, where, (victim,))
        for spec in study.grid.defenses:
            released = f"{victim}, {spec}"
            yield Task(released, _released, (*where, spec), (victim,))
            for cell in study.grid.attacker(queries, spec):
                text = " ".join(map(str, cell))
                yield Task(f"{released} <- {text}", _attack, (*where, spec, *cell), (released,))


def finish_training(study: Study, seed: int, name: str, out: Path, log: Log) -> Path:
    """Train or resume a training of a study unless it is finished; returns its run folder."""
    folder = study.folder(out, seed, name)
    train(
        study.training(name, seed, out),
        folder,
        log=lambda line: log(f"[seed {seed} {name}] {line}"),
    )
    return folder


def _train(job: _StudyRun, seed: int, name: str) -> None:
    """Train; export and verify if the training is evaluated."""
    _check_shared(job.out)
    with held("out", job.out):
        folder = finish_training(job.study, seed, name, job.out, _print)
        if name in job.study.evaluated:
            deploy_run(load_run(folder), _splits(job), name=name)


def _side_effects(job: _StudyRun, seed: int, name: str) -> None:
    _assess(job, seed, name, lambda victim: victim.side_effects(seed))


def _released(job: _StudyRun, seed: int, name: str, spec: str) -> None:
    _assess(job, seed, name, lambda victim: victim.released(seed, spec))


def _attack(
    job: _StudyRun, seed: int, name: str, spec: str, text: str, budget: int, clone: str
) -> None:
    def attack(victim: Assessment) -> None:
        if not victim.released(seed, spec).unreachable:
            victim.attack(seed, spec, text, budget, clone)

    _assess(job, seed, name, attack)


def _assess(job: _StudyRun, seed: int, name: str, part: Callable[[Assessment], object]) -> None:
    _check_shared(job.out)
    with held("out", job.out), cpu_threads(job.study.grid.threads):
        part(_assessment(job, seed, name))


@functools.lru_cache(maxsize=1)  # a victim's tasks run in a row
def _assessment(job: _StudyRun, seed: int, name: str) -> Assessment:
    run = load_run(job.study.folder(job.out, seed, name))
    return Assessment(_context(job), deploy_run(run, _splits(job), name=name))


@functools.lru_cache(maxsize=1)
def _context(job: _StudyRun) -> Context:
    splits, grid = _splits(job), job.study.grid
    return Context(grid.measured(splits), grid.queries(splits), grid, job.out, _print)


@functools.lru_cache(maxsize=1)
def _splits(job: _StudyRun) -> Splits:
    return load_splits(job.study.training("fp", job.study.seeds[0], job.out))


def _check_shared(out: Path) -> None:
    if not (out / "config.yaml").is_file():
        raise FileNotFoundError(
            f"out: wanted a folder that all workers share, but this one does not see {out}"
        )


def _print(line: str) -> None:
    """Print a line in one write, so that lines of several processes do not mix."""
    print(f"{line}\n", end="", flush=True)
