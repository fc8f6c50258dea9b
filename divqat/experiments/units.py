"""The units of a study: trainings, and parts of the evaluation of each victim."""

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
from divqat.experiments.subjects import subject_of
from divqat.experiments.workers import Unit
from divqat.train import Run, load_run, train
from divqat.train.folder import load_splits

Log = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class _Job:
    """A study in its folder.

    Attributes:
        token: tells this run of the study from others: a worker keeps what it has loaded for it.
    """

    study: Study
    out: Path
    token: str

    def __hash__(self) -> int:
        return hash(self.token)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Job) and self.token == other.token


def units_of(study: Study, queries: int, out: Path) -> list[Unit]:
    """All units of a study, each after those whose results it reads.

    Args:
        queries: images of the query set.
        out: the folder of the study, absolute.
    """
    job = _Job(study, out, secrets.token_hex(8))
    return [unit for seed in study.seeds for unit in _units_of_seed(job, queries, seed)]


def _units_of_seed(job: _Job, queries: int, seed: int) -> Iterator[Unit]:
    study = job.study
    for name in study.names:
        needs = tuple(f"seed {seed} {other}" for other in study.needs(name))
        yield Unit(f"seed {seed} {name}", _train, (job, seed, name), needs)
    for name in study.evaluated:
        victim, where = f"seed {seed} {name}", (job, seed, name)
        yield Unit(f"{victim}: side effects", _side_effects, where, (victim,))
        for spec in study.grid.defenses:
            released = f"{victim}, {spec}"
            yield Unit(released, _released, (*where, spec), (victim,))
            for cell in study.grid.attacker(queries, spec):
                text = " ".join(map(str, cell))
                yield Unit(f"{released} <- {text}", _attack, (*where, spec, *cell), (released,))


def trained(study: Study, seed: int, name: str, out: Path, log: Log) -> Run:
    """A training of a study, after what is left of it was done."""
    folder = study.folder(out, seed, name)
    train(
        study.training(name, seed, out),
        folder,
        log=lambda line: log(f"[seed {seed} {name}] {line}"),
    )
    return load_run(folder)


def _train(job: _Job, seed: int, name: str) -> None:
    """Train, and where it is evaluated, export and verify."""
    _check_shared(job.out)
    with held("out", job.out):
        run = trained(job.study, seed, name, job.out, _print)
        if name in job.study.evaluated:
            subject_of(run, _splits(job), name=name)


def _side_effects(job: _Job, seed: int, name: str) -> None:
    _assess(job, seed, name, lambda victim: victim.side_effects(seed))


def _released(job: _Job, seed: int, name: str, spec: str) -> None:
    _assess(job, seed, name, lambda victim: victim.released(seed, spec))


def _attack(job: _Job, seed: int, name: str, spec: str, text: str, budget: int, clone: str) -> None:
    def attack(victim: Assessment) -> None:
        if not victim.released(seed, spec).unreachable:
            victim.attack(seed, spec, text, budget, clone)

    _assess(job, seed, name, attack)


def _assess(job: _Job, seed: int, name: str, part: Callable[[Assessment], object]) -> None:
    _check_shared(job.out)
    with held("out", job.out), cpu_threads(job.study.grid.threads):
        part(_assessment(job, seed, name))


@functools.lru_cache(maxsize=1)  # units of one victim follow each other
def _assessment(job: _Job, seed: int, name: str) -> Assessment:
    run = load_run(job.study.folder(job.out, seed, name))
    return Assessment(_context(job), subject_of(run, _splits(job), name=name))


@functools.lru_cache(maxsize=1)
def _context(job: _Job) -> Context:
    splits, grid = _splits(job), job.study.grid
    return Context(grid.measured(splits), grid.queries(splits), grid, job.out, _print)


@functools.lru_cache(maxsize=1)
def _splits(job: _Job) -> Splits:
    return load_splits(job.study.training("fp", job.study.seeds[0], job.out))


def _check_shared(out: Path) -> None:
    if not (out / "config.yaml").is_file():
        raise FileNotFoundError(
            f"out: wanted a folder that all workers share, but {out} is not there on this one"
        )


def _print(line: str) -> None:
    """Print a whole line at once, as other processes print, too."""
    print(f"{line}\n", end="", flush=True)
