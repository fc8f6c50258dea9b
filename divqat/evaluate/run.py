"""Run an evaluation: every victim behind every defense, attacked in every way.

OUT/evaluation.json, report.html, report.md, plots/
OUT/cells/seed<n>/<victim>/side-effects.json                         calibration, robustness
OUT/cells/seed<n>/<victim>/<defense>/released.json                   answers, before any attack
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
    """Run what is left of an evaluation, and write its report.

    What is finished in ``out`` is kept as long as victim, images and settings are the same; a
    killed attack goes on where it was.

    Args:
        subjects: the victims.
        splits: their data, of which :meth:`Grid.measured` says what is measured on. Attacks see
            none of it but ``grid.holdout`` images of the validation split, which choose the best
            clone, and ``grid.labeled`` others, for the attacks that train on some; defenses that
            train see the training images.
        grid: what is tried.
        out: the folder of the evaluation; made if it does not exist.
        queries: ``grid.queries(splits)`` if it is loaded already.
        report: else ``out`` gets the cells only, of some victims beside those of other processes.
        command: what the report says made it.
        deployed: what the report says the victims are.
        log: takes a line per attack.

    Returns:
        The content of ``OUT/evaluation.json``, written or not.

    Raises:
        TypeError: ``subjects`` is one.
        ValueError: two victims of one name and seed, no victim, or too few validation images.
        Others: as the attacks and defenses.
    """
    check_tree(check_folder("out", out))
    if isinstance(subjects, Subject):
        raise TypeError("subjects: wanted a sequence of Subject, got one")
    # As folders, also where capitals make no difference.
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
            runner.subject(subject)
            result = runner.result(command, deployed)
            if report:
                result.save(runner.out / EVALUATION)
        if report:
            log(f"report: {write_report(runner.out)}")
    return result


class _Runner:
    """The cells of an evaluation, on the data that they share."""

    def __init__(self, splits: Splits, queries: Tensor, grid: Grid, out: Path, log: Log) -> None:
        self.splits, self.grid, self.out, self.log = splits, grid, out, log
        self.test = ImageSet(splits.test.images, splits.test.labels)
        self.queries = queries
        self.overlap = overlaps(splits, self.queries)
        self.data = data_fingerprint(splits, self.queries)  # of every part's identity
        self.device = find_device(grid.device)
        self.released: list[Released] = []
        self.cells: list[Cell] = []
        self.side_effects: list[SideEffects] = []

    def subject(self, subject: Subject) -> None:
        """Everything about one victim."""
        deployed = Deployed(subject, self.queries, self.test)
        seeds = range(self.grid.seeds) if subject.seed is None else (subject.seed,)
        for seed in seeds:
            self.beside(deployed, seed)
            fitted: dict[str, Defense] = {}
            for spec in self.grid.defenses:
                # When something is left to do, and then only once.
                defended = functools.cache(
                    functools.partial(
                        defend, spec, deployed, self.splits.train, self._surrogate, seed, fitted
                    )
                )
                self.defended(subject, deployed.source, defended, seed, spec)

    def beside(self, deployed: Deployed, seed: int) -> None:
        """What may have changed in a victim besides."""
        subject, grid = deployed.subject, self.grid
        here: dict[str, Any] = {"victim": deployed.source, "seed": seed, "data": self.data}
        if subject.gradients is not None:
            here |= {"gradients": fingerprint(subject.gradients.state_dict())}
            here |= {"epsilons": grid.epsilons, "images": grid.adversarial_images}
        file = self.out / "cells" / f"seed{seed}" / _file_name(subject.name) / "side-effects.json"

        def make() -> dict[str, Any]:
            return {"row": measure(deployed, grid.epsilons, grid.adversarial_images, seed)}

        row = step(file, _digest(here), make)["row"]
        self.side_effects.append(side_effects({"seed": seed, "victim": subject.name, **row}))
        self.log(f"[seed {seed} {subject.name}] {self.side_effects[-1]}")

    def defended(
        self,
        subject: Subject,
        source: str,
        defended: Callable[[], Defended],
        seed: int,
        spec: str,
    ) -> None:
        """Everything about one victim behind one defense."""
        folder = self.out / "cells" / f"seed{seed}" / _file_name(subject.name) / _file_name(spec)
        here = {"victim": source, "defense": spec, "surrogate": self.grid.surrogate, "seed": seed}
        here |= {"data": self.data, "holdout": self.grid.holdout}
        common: dict[str, Any] = {"seed": seed, "victim": subject.name, "defense": spec}

        def release() -> dict[str, Any]:
            try:
                return {"row": defended().measure()}
            except OutOfReach as error:
                return {"row": {"settings": spec, "unreachable": str(error)}}

        row = step(folder / "released.json", _digest(here), release)["row"]
        found = {**common, "method": subject.method, "agreement": subject.agreement, **row}
        self.released.append(released(found))
        if row.get("unreachable"):
            self.log(f"[seed {seed} {subject.name}] {spec}: {row['unreachable']}")
            return
        for text, budget, clone in self.grid.attacker(len(self.queries), spec):
            attack = self.grid.attack(text, budget, seed)
            identity = {"attack": type(attack).__name__, **attack.to_dict(), "clone": clone}
            if owns(text):
                identity["labeled"] = self.grid.labeled
            key = _digest({**here, **identity})
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
        """What has been found so far."""
        known = self.splits.validation  # which may be fewer than the attacker is to own
        return Evaluation(
            dataset=self.splits.name,
            num_classes=self.splits.num_classes,
            chance=chance(self.test.labels),
            query_images=len(self.queries),
            overlap=self.overlap,
            grid=self.grid.to_dict() | {"holdout": min(self.grid.holdout, len(known))},
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
        some = validation.subset(torch.randperm(len(validation), generator=generator)[part])
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
