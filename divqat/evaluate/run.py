"""Run an evaluation: attack every victim, behind every defense, with every attack.

OUT/evaluation.json, report.html, report.md, plots/
OUT/cells/seed<n>/<victim>/side-effects.json                         calibration, robustness
OUT/cells/seed<n>/<victim>/<defense>/released.json                   released answers
OUT/cells/seed<n>/<victim>/<defense>/<attack>-<budget>-<clone>.json  one attack
"""

from __future__ import annotations

import datetime
import functools
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
from divqat._util.bounds import check_tree
from divqat._util.devices import cpu_threads, find_device, fingerprint, hardware, versions
from divqat._util.files import step
from divqat._util.held import held
from divqat._util.names import check_folder
from divqat._util.seeds import derived_seed
from divqat.attacks import Attack
from divqat.attacks.labeled import LabeledAttack
from divqat.data import ImageSet, Splits
from divqat.defenses import Defense
from divqat.evaluate.cells import run_attack
from divqat.evaluate.defended import Defended, OutOfReach, defend
from divqat.evaluate.grid import Grid
from divqat.evaluate.report import write_report
from divqat.evaluate.results import (
    EVALUATION,
    Cell,
    Evaluation,
    Released,
    SideEffects,
    released,
    side_effects,
)
from divqat.evaluate.side_effects import measure
from divqat.evaluate.specs import owns
from divqat.evaluate.subject import Deployed, Subject, data_fingerprint, overlaps
from divqat.metrics import chance

Log = Callable[[str], object]


def evaluate(
    subjects: Sequence[Subject],
    splits: Splits,
    grid: Grid,
    out: str | Path,
    *,
    queries: Tensor | None = None,
    report: bool = True,
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
        report: write ``evaluation.json`` and the report; False writes only the cells, for one of
            several processes that share ``out``.
        command: the command, for the report.
        deployed: a description of the victims, for the report.
        log: receives one line per attack.

    Returns:
        The content of ``OUT/evaluation.json``, whether it was written or not.

    Raises:
        TypeError: ``subjects`` is a single Subject.
        ValueError: two victims have the same name and seed; no victim; too few validation images.
        Others: see the attacks and defenses.
    """
    check_tree(check_folder("out", out))
    if isinstance(subjects, Subject):
        raise TypeError("subjects: wanted a sequence of Subject, got one")
    # Names become folders, and some file systems ignore case.
    names = Counter((_file_name(subject.name).lower(), subject.seed) for subject in subjects)
    if not subjects or max(names.values()) > 1:
        got = [(subject.name, subject.seed) for subject in subjects]
        raise ValueError(f"subjects: wanted victims of different names, got {got}")
    queries = grid.queries(splits) if queries is None else queries
    grid.check(splits, len(queries))
    splits = grid.measured(splits)
    with held("out", out) as folder, cpu_threads(grid.threads):
        runner = _Runner(splits, queries, grid, folder, log)
        log(f"{len(runner.queries)} queries of {grid.query_set}, {len(subjects)} victims")
        for subject in subjects:
            runner.run_subject(subject)
            result = runner.result(command, deployed)
            if report:
                result.save(runner.out / EVALUATION)
        if report:
            log(f"report: {write_report(runner.out)}")
    return result


class _Runner:
    """Runs the cells of an evaluation on the data that they share."""

    def __init__(self, splits: Splits, queries: Tensor, grid: Grid, out: Path, log: Log) -> None:
        self.splits, self.grid, self.out, self.log = splits, grid, out, log
        self.test = ImageSet(splits.test.images, splits.test.labels)
        self.queries = queries
        self.overlap = overlaps(splits, self.queries)
        self.data = data_fingerprint(splits, self.queries)  # part of every cell's identity
        self.device = find_device(grid.device)
        self.released: list[Released] = []
        self.cells: list[Cell] = []
        self.side_effects: list[SideEffects] = []

    def run_subject(self, subject: Subject) -> None:
        """All cells of one victim."""
        deployed = Deployed(subject, self.queries, self.test)
        seeds = range(self.grid.seeds) if subject.seed is None else (subject.seed,)
        for seed in seeds:
            self.measure_side_effects(deployed, seed)
            fitted: dict[str, Defense] = {}
            for spec in self.grid.defenses:
                # Fitted only if a cell is unfinished, and then only once.
                defended = functools.cache(
                    functools.partial(
                        defend, spec, deployed, self.splits.train, self._surrogate, seed, fitted
                    )
                )
                self.run_defense(subject, deployed.source, defended, seed, spec)

    def measure_side_effects(self, deployed: Deployed, seed: int) -> None:
        """Calibration and robustness of one victim."""
        subject, grid = deployed.subject, self.grid
        key: dict[str, Any] = {"victim": deployed.source, "seed": seed, "data": self.data}
        if subject.gradients is not None:
            key |= {"gradients": fingerprint(subject.gradients.state_dict())}
            key |= {"epsilons": grid.epsilons, "images": grid.adversarial_images}
        file = self.out / "cells" / f"seed{seed}" / _file_name(subject.name) / "side-effects.json"

        def make() -> dict[str, Any]:
            return {"row": measure(deployed, grid.epsilons, grid.adversarial_images, seed)}

        row = step(file, _digest(key), make)["row"]
        self.side_effects.append(side_effects({"seed": seed, "victim": subject.name, **row}))
        self.log(f"[seed {seed} {subject.name}] {self.side_effects[-1]}")

    def run_defense(
        self,
        subject: Subject,
        source: str,
        defended: Callable[[], Defended],
        seed: int,
        spec: str,
    ) -> None:
        """All cells of one victim behind one defense."""
        folder = self.out / "cells" / f"seed{seed}" / _file_name(subject.name) / _file_name(spec)
        base = {"victim": source, "defense": spec, "surrogate": self.grid.surrogate, "seed": seed}
        base |= {"data": self.data, "holdout": self.grid.holdout}
        common: dict[str, Any] = {"seed": seed, "victim": subject.name, "defense": spec}

        def release() -> dict[str, Any]:
            try:
                return {"row": defended().measure()}
            except OutOfReach as error:
                return {"row": {"settings": spec, "unreachable": str(error)}}

        row = step(folder / "released.json", _digest(base), release)["row"]
        training = {"method": subject.method, "agreement": subject.agreement}
        self.released.append(released({**common, **training, **row}))
        if row.get("unreachable"):
            self.log(f"[seed {seed} {subject.name}] {spec}: {row['unreachable']}")
            return
        for text, budget, clone in self.grid.attacker(len(self.queries), spec):
            attack = self.grid.attack(text, budget, seed)
            identity = {"attack": type(attack).__name__, **attack.to_dict(), "clone": clone}
            if owns(text):
                identity["labeled"] = self.grid.labeled
            key = _digest({**base, **identity})
            work = folder / _file_name(f"{text}-{budget}-{clone}")

            about = {"attack": text, "budget": budget, "clone": clone}

            def run(
                attack: Attack = attack,
                about: dict[str, Any] = about,
                work: Path = work / key,
            ) -> dict[str, Any]:
                if isinstance(attack, LabeledAttack) and attack.owns:
                    attack = attack.owning(self._labeled(seed))
                network, holdout = self._clone(about["clone"], seed), self._holdout(seed)
                return {**about, "row": run_attack(attack, defended(), network, holdout, work)}

            row = step(work.with_name(work.name + ".json"), key, run)["row"]
            self.cells.append(Cell(**{**common, **row, **about}))
            shutil.rmtree(work, ignore_errors=True)  # the checkpoints
            self.log(
                f"[seed {seed} {subject.name}] {spec} <- {text} {budget} {clone}: clone "
                f"{row['accuracy']:.2%}, fidelity {row['fidelity']:.2%}, {row['seconds']:.0f} s"
            )

    def result(self, command: str, deployed: str) -> Evaluation:
        """The results so far."""
        available = len(self.splits.validation)  # may be fewer than the attacker is to own
        return Evaluation(
            dataset=self.splits.name,
            num_classes=self.splits.num_classes,
            chance=chance(self.test.labels),
            query_images=len(self.queries),
            overlap=self.overlap,
            grid=self.grid.to_dict() | {"holdout": min(self.grid.holdout, available)},
            deployed=deployed,
            command=command,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            versions=versions(),
            hardware=hardware(),
            released=self.released,
            cells=self.cells,
            side_effects=self.side_effects,
        )

    def _holdout(self, seed: int) -> ImageSet:
        return self._owned(seed, slice(self.grid.holdout))

    def _labeled(self, seed: int) -> ImageSet:
        start = self.grid.holdout
        return self._owned(seed, slice(start, start + self.grid.labeled))

    def _owned(self, seed: int, part: slice) -> ImageSet:
        validation = self.splits.validation
        generator = torch.Generator().manual_seed(derived_seed(seed, "holdout"))
        owned = validation.subset(torch.randperm(len(validation), generator=generator)[part])
        return ImageSet(owned.images, owned.labels)

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
