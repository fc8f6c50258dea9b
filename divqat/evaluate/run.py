"""Run an evaluation: attack every victim, behind every defense, with every attack.

OUT/evaluation.json, report.html, report.md, plots/
OUT/cells/…   see divqat.evaluate.assessment
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from torch import Tensor

from divqat._util.bounds import check_tree
from divqat._util.devices import cpu_threads, hardware, versions
from divqat._util.held import held
from divqat._util.names import check_folder
from divqat._util.progress import duration
from divqat.data import Splits
from divqat.evaluate.assessment import Assessment, Context, Log, folder_key
from divqat.evaluate.grid import Grid
from divqat.evaluate.report import write_report
from divqat.evaluate.results import EVALUATION, Evaluation
from divqat.evaluate.subject import Subject, overlaps
from divqat.metrics import chance


def evaluate(
    subjects: Sequence[Subject],
    splits: Splits,
    grid: Grid,
    out: str | Path,
    *,
    queries: Tensor | None = None,
    command: str = "",
    deployed: str = "the model as it was given",
    log: Log = print,
) -> Evaluation:
    """Run the unfinished part of an evaluation, and write its report.

    Finished cells in ``out`` are kept as long as victim, images and settings are the same; a killed
    attack resumes.

    Args:
        subjects: the victims.
        splits: their data; accuracies are measured on ``grid.measured(splits).test``. Attacks see
            only ``grid.holdout`` images of the validation split, which choose the best clone, and
            ``grid.labeled`` others, for the attacks that train on some. Defenses that train see the
            training images.
        grid: attacks, defenses, query budgets and clones.
        out: the folder of the evaluation; created if it does not exist.
        queries: ``grid.queries(splits)``, if already loaded.
        command: the command, for the report.
        deployed: a description of the victims, for the report.
        log: receives one line per attack.

    Returns:
        The content of ``OUT/evaluation.json``.

    Raises:
        TypeError: ``subjects`` is a single Subject.
        ValueError: two victims have the same name and seed; no victim; too few validation images.
        Others: see the attacks and defenses.
    """
    check_tree(check_folder("out", out))
    if isinstance(subjects, Subject):
        raise TypeError("subjects: wanted a sequence of Subject, got one")
    if not subjects or max(Counter(map(folder_key, subjects)).values()) > 1:
        got = [(subject.name, subject.seed) for subject in subjects]
        raise ValueError(f"subjects: wanted victims with different names, got {got}")
    queries = grid.queries(splits) if queries is None else queries
    grid.check(splits, len(queries))
    with held("out", out) as folder, cpu_threads(grid.threads):
        context = Context(grid.measured(splits), queries, grid, folder, log)
        seeds = sum(grid.seeds if subject.seed is None else 1 for subject in subjects)
        count = seeds * sum(_count_attacks(context, spec) for spec in grid.defenses)
        log(f"{len(queries)} queries of {grid.query_set}, {len(subjects)} victims, {count} attacks")
        result = _empty_result(context, command, deployed)
        for subject in subjects:
            _assess(Assessment(context, subject), result, count)
            result.save(folder / EVALUATION)
        log(f"report: {write_report(folder)}")
    return result


def _count_attacks(context: Context, spec: str) -> int:
    """The number of attacks on a victim behind a defense."""
    return len(list(context.grid.attacker(len(context.queries), spec)))


def _assess(victim: Assessment, result: Evaluation, count: int) -> None:
    """Run all parts of a victim's evaluation, and add them to ``result``, which is to have
    ``count`` attacks."""
    grid, queries = victim.context.grid, len(victim.context.queries)
    for seed in victim.seeds:
        result.side_effects.append(victim.side_effects(seed))
        for spec in grid.defenses:
            released = victim.released(seed, spec)
            result.released.append(released)
            if not released.unreachable:
                for cell in grid.attacker(queries, spec):
                    result.cells.append(victim.attack(seed, spec, *cell))
                    _log_pace(victim.context, result, count)


def _log_pace(context: Context, result: Evaluation, count: int) -> None:
    """Log how many attacks are done, and how long the others take if they are like these."""
    skipped = [row.defense for row in result.released if row.unreachable]
    count -= sum(_count_attacks(context, spec) for spec in skipped)
    done = len(result.cells)
    if done < count:
        left = (count - done) * mean(cell.seconds for cell in result.cells)
        context.log(f"{done} of {count} attacks, about {duration(left)} left")


def _empty_result(context: Context, command: str, deployed: str) -> Evaluation:
    splits, grid = context.splits, context.grid
    holdout = min(grid.holdout, len(splits.validation))
    return Evaluation(
        dataset=splits.name,
        num_classes=splits.num_classes,
        chance=chance(context.test.labels),
        query_images=len(context.queries),
        overlap=overlaps(splits, context.queries),
        grid=grid.to_dict() | {"holdout": holdout},
        deployed=deployed,
        command=command,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=versions(),
        hardware=hardware(),
        released=[],
        cells=[],
        side_effects=[],
    )
