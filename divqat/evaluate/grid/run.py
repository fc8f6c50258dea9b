"""Run an evaluation: every victim behind every defense, attacked in every way.

OUT/evaluation.json, report.html, report.md, plots/
OUT/cells/seed<n>/<victim>/<defense>/released.json                   answers, before any attack
OUT/cells/seed<n>/<victim>/<defense>/<attack>-<budget>-<clone>.json  one attack
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat import models
from divqat.data import ImageSet, Splits
from divqat.defenses import Defense
from divqat.evaluate.grid.cell import run_attack
from divqat.evaluate.grid.config import Grid
from divqat.evaluate.grid.defended import Defended, OutOfReach, defend, measure
from divqat.evaluate.grid.report import write_report
from divqat.evaluate.grid.result import EVALUATION, Cell, Evaluation, Released, released
from divqat.evaluate.grid.subject import Remembered, Subject, overlaps
from divqat.evaluate.metrics import chance, predict
from divqat.evaluate.result import hardware, versions
from divqat.files import step
from divqat.train.folder import derived_seed
from divqat.train.loop import cpu_threads, find_device

Log = Callable[[str], object]


def evaluate(
    subjects: Sequence[Subject],
    splits: Splits,
    grid: Grid,
    out: str | Path,
    *,
    command: str = "",
    deployed: str = "the model as it was given",
    log: Log = print,
) -> Evaluation:
    """Run what is left of an evaluation, and write its report.

    What is finished in ``out`` is kept as long as victim and settings are the same; a killed attack
    goes on where it was.

    Args:
        subjects: the victims.
        splits: their data. Attacks see none of it but ``grid.holdout`` images of the validation
            split, which choose the best clone; defenses that train see the training images.
        grid: what is tried.
        out: the folder of the evaluation; made if it does not exist.
        command: what the report says made it.
        deployed: what the report says the victims are.
        log: takes a line per attack.

    Returns:
        The content of ``OUT/evaluation.json``.

    Raises:
        ValueError: two victims of one name and seed, or no victim.
        Others: as the attacks and defenses.
    """
    names = Counter((subject.name, subject.seed) for subject in subjects)
    if not subjects or max(names.values()) > 1:
        raise ValueError(f"subjects: wanted victims of different names, got {list(names)}")
    runner = _Runner(splits, grid, Path(out), log)
    log(f"{len(runner.queries)} queries of {grid.query_set}, {len(subjects)} victims")
    with cpu_threads(grid.threads):
        for subject in subjects:
            runner.subject(subject)
            result = runner.result(command, deployed)
            result.save(runner.out / EVALUATION)
    log(f"report: {write_report(runner.out)}")
    return result


class _Runner:
    """The cells of an evaluation, on the data that they share."""

    def __init__(self, splits: Splits, grid: Grid, out: Path, log: Log) -> None:
        self.splits, self.grid, self.out, self.log = splits, grid, out, log
        self.test = ImageSet(splits.test.images, splits.test.labels)
        self.queries = grid.queries(splits)
        self.overlap = overlaps(splits, self.queries)
        self.device = find_device(grid.device)
        self.attacks = list(grid.attacker(len(self.queries)))
        self.released: list[Released] = []
        self.cells: list[Cell] = []

    def subject(self, subject: Subject) -> None:
        """Everything about one victim."""
        model = Remembered(subject.model, self.queries)
        source = subject.fingerprint(self.queries[:256])
        logits = predict(subject.model, self.test.images)
        seeds = range(self.grid.seeds) if subject.seed is None else (subject.seed,)
        for seed in seeds:
            fitted: dict[str, Defense] = {}
            for spec in self.grid.defenses:
                self.defended(subject, source, model, logits, seed, spec, fitted)

    def defended(
        self,
        subject: Subject,
        source: str,
        model: Remembered,
        test_logits: Tensor,  # [N, num_classes]
        seed: int,
        spec: str,
        fitted: dict[str, Defense],
    ) -> None:
        """Everything about one victim behind one defense."""
        folder = self.out / "cells" / f"seed{seed}" / _file_name(subject.name) / _file_name(spec)
        here = {"victim": source, "defense": spec, "surrogate": self.grid.surrogate, "seed": seed}
        here |= {name: getattr(self.grid, name) for name in ("query_set", "query_limit", "holdout")}
        common: dict[str, Any] = {"seed": seed, "victim": subject.name, "defense": spec}
        files = [folder / f"{_file_name('-'.join(map(str, cell)))}.json" for cell in self.attacks]
        keys = [_digest({**here, **self._identity(cell, seed)}) for cell in self.attacks]
        defended: Defended | None = None

        def ready() -> Defended:
            nonlocal defended  # fitted when a cell is left to do, and then only once
            if defended is None:
                defended = defend(
                    spec, model, self.queries, self.splits.train, self._surrogate, seed, fitted
                )
            return defended

        def release() -> dict[str, Any]:
            try:
                return measure(ready(), self.test, test_logits, self.queries)
            except OutOfReach as error:
                return {"settings": spec, "unreachable": str(error)}

        row = step(folder / "released.json", _digest(here), lambda: {"row": release()})["row"]
        about = {**common, "method": subject.method, "agreement": subject.agreement, **row}
        self.released.append(released(about))
        if row.get("unreachable"):
            self.log(f"[seed {seed} {subject.name}] {spec}: {row['unreachable']}")
            return
        for cell, file, key in zip(self.attacks, files, keys, strict=True):

            def attack(cell: tuple[str, int, str] = cell, file: Path = file, key: str = key) -> Any:
                text, budget, clone = cell
                row = run_attack(
                    self.grid.attack(text, budget, seed),
                    ready(),
                    self.queries,
                    self._clone(clone, seed),
                    file.with_suffix("") / key,
                    test=self.test,
                    released=ready().release(self.test.images, test_logits),
                    holdout=self._holdout(seed),
                )
                self.log(
                    f"[seed {seed} {subject.name}] {spec} <- {' '.join(map(str, cell))}: clone "
                    f"{row['accuracy']:.2%}, fidelity {row['fidelity']:.2%}, "
                    f"{row['seconds']:.0f} s"
                )
                return {"row": {"attack": text, "budget": budget, "clone": clone, **row}}

            self.cells.append(Cell(**{**common, **step(file, key, attack)["row"]}))
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)  # the checkpoints

    def result(self, command: str, deployed: str) -> Evaluation:
        """What has been found so far."""
        return Evaluation(
            dataset=self.splits.name,
            num_classes=self.splits.num_classes,
            chance=chance(self.test.labels),
            query_images=len(self.queries),
            overlap=self.overlap,
            grid=self.grid.to_dict(),
            deployed=deployed,
            command=command,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            versions=versions(),
            hardware=hardware(),
            released=self.released,
            cells=self.cells,
        )

    def _identity(self, cell: tuple[str, int, str], seed: int) -> dict[str, Any]:
        text, budget, clone = cell
        attack = self.grid.attack(text, budget, seed)
        return {"attack": type(attack).__name__, **attack.to_dict(), "clone": clone}

    def _holdout(self, seed: int) -> ImageSet:
        validation = self.splits.validation
        generator = torch.Generator().manual_seed(derived_seed(seed, "holdout"))
        rows = torch.randperm(len(validation), generator=generator)[: self.grid.holdout]
        some = validation.subset(rows)
        return ImageSet(some.images, some.labels)

    def _clone(self, name: str, seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(derived_seed(seed, "clone"))
            return self._network(name)

    def _surrogate(self) -> nn.Module:
        return self._network(self.grid.surrogate)

    def _network(self, name: str) -> nn.Module:
        splits = self.splits
        return models.build(
            name,
            in_channels=splits.channels,
            num_classes=splits.num_classes,
            image_size=splits.image_size,
        ).to(self.device)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text)


def _digest(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
