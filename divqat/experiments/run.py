"""Run a study: train every victim with every seed, export it, and evaluate all of them.

OUT/config.yaml
OUT/seed<n>/<name>/   a training and its export
OUT/…                 the files of divqat.evaluate.run
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
from divqat.experiments.subjects import deploy_run, describe_deployment
from divqat.experiments.tasks import finish_training, study_tasks
from divqat.train import Run, load_run
from divqat.train.folder import load_splits

OLD = "result.json"  # written by versions before studies existed


def run_study(
    study: Study,
    out: str | Path,
    *,
    jobs: int = 1,
    cluster: str | None = None,
    command: str = "",
    log: Callable[[str], object] = print,
) -> Evaluation:
    """Run the unfinished parts of a study, and write the report.

    Finished parts in ``out`` are kept, and an interrupted training or attack resumes. Seeds,
    victims, attacks and defenses can be added to a finished study.

    Args:
        study: the settings.
        out: the folder of the study; created if it does not exist.
        jobs: number of trainings and attacks at a time, each in its own process, which prints its
            own lines. Measured times then include the slowdown from running in parallel.
        cluster: the address of a dask scheduler, whose workers train and attack. Each has to see
            ``out`` under the same path, and prints its lines where it runs.
        command: the command line to show in the report.
        log: is called with a line per epoch and attack.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        ConfigError: both ``jobs`` and ``cluster`` are given.
        ValueError: a training in ``out`` has other settings, or ``out`` is from an older version.
        Others: as :func:`divqat.train.train`, :func:`divqat.evaluate.evaluate` and
            :func:`divqat.experiments.workers.run_tasks`.
    """
    if jobs > 1 and cluster is not None:
        raise ConfigError(f"jobs: wanted 1 with a cluster, which has its own workers, got {jobs}")
    executor: AbstractContextManager[Executor] | None = None
    if cluster is not None:
        executor = workers.cluster_executor(cluster)
    elif jobs > 1:
        executor = workers.process_executor(jobs)
    with held("out", out) as folder:
        check_tree(folder)
        if (folder / OLD).is_file():
            raise ValueError(
                f"{out} holds results of an older divqat ({OLD}): choose another --out, or move "
                f"{OLD} elsewhere to reuse the trainings in {out}"
            )
        return _run_study(study, folder, executor, command, log)


def _run_study(
    study: Study,
    out: Path,
    executor: AbstractContextManager[Executor] | None,
    command: str,
    log: Callable[[str], object],
) -> Evaluation:
    # Load all data first: what is missing should be reported before hours of training.
    splits = load_splits(study.training("fp", study.seeds[0], out))
    queries = study.grid.queries(splits)
    study.grid.check(splits, len(queries))
    write_yaml(out / "config.yaml", asdict(study))
    if executor is not None:  # the code below then only reads what the workers wrote
        tasks = study_tasks(study, len(queries), out.resolve())
        with executor as entered:
            workers.run_tasks(tasks, entered, log)
    runs = [run for seed in study.seeds for run in _train_seed(study, seed, out, log)]
    return evaluate(
        [deploy_run(run, splits, name=name) for name, run in runs],
        splits,
        study.grid,
        out,
        queries=queries,
        command=command,
        deployed="; ".join(dict.fromkeys(describe_deployment(run) for _, run in runs)),
        log=log,
    )


def _train_seed(
    study: Study, seed: int, out: Path, log: Callable[[str], object]
) -> Iterator[tuple[str, Run]]:
    """Finish the trainings of a seed, and yield name and run of those that are evaluated."""
    for name in study.names:
        folder = finish_training(study, seed, name, out, log)
        if name in study.evaluated:
            yield name, load_run(folder)
