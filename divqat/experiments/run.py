"""Run a study: train every victim with every seed, deploy it, and evaluate all of them.

OUT/config.yaml
OUT/seed<n>/<name>/   a training, and what is exported of it
OUT/…                 what divqat.evaluate.run writes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from divqat._util.bounds import check_tree
from divqat._util.held import held
from divqat._util.settings import ConfigError, write_yaml
from divqat.evaluate import Evaluation, evaluate
from divqat.experiments import workers
from divqat.experiments.study import Study
from divqat.experiments.subjects import kind_of, subject_of
from divqat.experiments.units import trained, units_of
from divqat.train import Run
from divqat.train.folder import load_splits

OLD = "result.json"  # what jobs wrote before they were studies


def run_study(
    study: Study,
    out: str | Path,
    *,
    jobs: int = 1,
    cluster: str | None = None,
    command: str = "",
    log: Callable[[str], object] = print,
) -> Evaluation:
    """Do what is left of a study, and write the report.

    Everything that is finished in ``out`` is kept, a killed part goes on where it was. Seeds,
    victims, attacks and defenses can be added to a finished study.

    Args:
        study: the settings.
        out: the folder of the study; made if it does not exist.
        jobs: so many trainings and attacks at a time, each in a process of its own that prints its
            lines. The seconds that are measured then are those with company.
        cluster: the address of a dask scheduler, whose workers train and attack. Each has to see
            ``out`` under the same path, and prints its lines where it runs.
        command: what the report says made it.
        log: takes a line per epoch and attack.

    Raises:
        ValueError: a training in ``out`` has other settings; or both ``jobs`` and ``cluster``.
        Others: as :func:`divqat.train.train`, :func:`divqat.evaluate.evaluate` and
            :func:`divqat.experiments.workers.run_units`.
    """
    if jobs > 1 and cluster is not None:
        raise ConfigError(f"jobs: wanted 1 with a cluster, which has its own workers, got {jobs}")
    executor: AbstractContextManager[Executor] | None = None
    if cluster is not None:
        executor = workers.cluster(cluster)
    elif jobs > 1:
        executor = workers.processes(jobs)
    with held("out", out) as folder:
        check_tree(folder)
        if (folder / OLD).is_file():
            raise ValueError(
                f"{out} holds a job of an older divqat, whose results are in {OLD}: choose another "
                f"--out, or move {OLD} elsewhere, and the trainings in {out} are taken over"
            )
        return _run_study(study, folder, executor, command, log)


def _run_study(
    study: Study,
    out: Path,
    executor: AbstractContextManager[Executor] | None,
    command: str,
    log: Callable[[str], object],
) -> Evaluation:
    # Now: that something is missing should be known before hours of training.
    splits = load_splits(study.training("fp", study.seeds[0], out))
    queries = study.grid.queries(splits)
    study.grid.check(splits, len(queries))
    write_yaml(out / "config.yaml", asdict(study))
    if executor is not None:  # what is left after that is to read what its workers wrote
        units = units_of(study, len(queries), out.resolve())
        with executor as running:
            workers.run_units(units, running, log)
    runs = [run for seed in study.seeds for run in _trained(study, seed, out, log)]
    return evaluate(
        [subject_of(run, splits, name=name) for name, run in runs],
        splits,
        study.grid,
        out,
        queries=queries,
        command=command,
        deployed="; ".join(dict.fromkeys(kind_of(run) for _, run in runs)),
        log=log,
    )


def _trained(
    study: Study, seed: int, out: Path, log: Callable[[str], object]
) -> Iterator[tuple[str, Run]]:
    """Train what is left of a seed; name and run of all that is evaluated."""
    for name in study.names:
        run = trained(study, seed, name, out, log)
        if name in study.evaluated:
            yield name, run
