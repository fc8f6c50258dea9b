"""The evaluation of one victim, in parts. Each part runs once, and its result is kept in a file.

OUT/cells/seed<n>/<victim>/side-effects.json                         calibration, robustness
OUT/cells/seed<n>/<victim>/<defense>/released.json                   answers behind the defense
OUT/cells/seed<n>/<victim>/<defense>/<attack>-<budget>-<clone>.json  one attack
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat import models
from divqat._util.devices import find_device, fingerprint
from divqat._util.files import step
from divqat._util.seeds import derived_seed
from divqat.attacks.labeled import LabeledAttack
from divqat.data import ImageSet, Splits
from divqat.defenses import Defense
from divqat.evaluate.cells import run_attack
from divqat.evaluate.defended import Defended, OutOfReach, defend
from divqat.evaluate.grid import Grid
from divqat.evaluate.results import Cell, Released, SideEffects, released, side_effects
from divqat.evaluate.side_effects import measure
from divqat.evaluate.specs import owns
from divqat.evaluate.subject import Deployed, Subject, data_fingerprint

Log = Callable[[str], object]


class Context:
    """What all victims of an evaluation share.

    Args:
        splits: their data, from :meth:`Grid.measured`.
        queries: the query set, uint8 [N, C, H, W].
        grid: attacks, defenses and their settings.
        out: the folder of the evaluation.
        log: is called with a line per part.
    """

    def __init__(self, splits: Splits, queries: Tensor, grid: Grid, out: Path, log: Log) -> None:
        self.splits, self.queries, self.grid, self.out, self.log = splits, queries, grid, out, log
        self.test = ImageSet(splits.test.images, splits.test.labels)
        self.data = data_fingerprint(splits, queries)  # in the identity of every part
        self.device = find_device(grid.device)

    def holdout(self, seed: int) -> ImageSet:
        """The attacker's labeled images for choosing the best clone."""
        return self._labeled_images(seed, slice(self.grid.holdout))

    def labeled(self, seed: int) -> ImageSet:
        """Other labeled images, for attacks that train on them."""
        start = self.grid.holdout
        return self._labeled_images(seed, slice(start, start + self.grid.labeled))

    def _labeled_images(self, seed: int, part: slice) -> ImageSet:
        validation = self.splits.validation
        generator = torch.Generator().manual_seed(derived_seed(seed, "holdout"))
        chosen = validation.subset(torch.randperm(len(validation), generator=generator)[part])
        return ImageSet(chosen.images, chosen.labels)

    def clone(self, name: str, seed: int) -> nn.Module:
        """An untrained clone, with initial weights from ``seed``."""
        with torch.random.fork_rng([]):
            torch.manual_seed(derived_seed(seed, "clone"))
            return self.network(name)

    def network(self, name: str) -> nn.Module:
        """An untrained network for this data, on the attacker's device."""
        splits = self.splits
        return models.build(
            name,
            in_channels=splits.channels,
            num_classes=splits.num_classes,
            image_size=splits.image_size,
        ).to(self.device)


class Assessment:
    """The parts of one victim's evaluation, which share its answers and fitted defenses.

    A part is read from its file if that was made from the same victim, images and settings.
    """

    def __init__(self, context: Context, subject: Subject) -> None:
        self.context, self.subject = context, subject
        self.deployed = Deployed(subject, context.queries, context.test)
        self._defended = functools.cache(self._defend)
        self._fitted: dict[int, dict[str, Defense]] = {}

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the attacks on this victim."""
        seed = self.subject.seed
        return tuple(range(self.context.grid.seeds)) if seed is None else (seed,)

    def side_effects(self, seed: int) -> SideEffects:
        """The calibration and adversarial robustness of the victim."""
        grid, gradients = self.context.grid, self.subject.gradients
        key: dict[str, Any] = {"victim": self.deployed.source, "seed": seed}
        key |= {"data": self.context.data}
        if gradients is not None:
            key |= {"gradients": fingerprint(gradients.state_dict())}
            key |= {"epsilons": grid.epsilons, "images": grid.adversarial_images}

        def make() -> dict[str, Any]:
            return {"row": measure(self.deployed, grid.epsilons, grid.adversarial_images, seed)}

        row = step(self._folder(seed) / "side-effects.json", _digest(key), make)["row"]
        result = side_effects({"seed": seed, "victim": self.subject.name, **row})
        self._log_line(seed, str(result))
        return result

    def released(self, seed: int, spec: str) -> Released:
        """The victim's answers behind a defense, before any attack."""

        def make() -> dict[str, Any]:
            try:
                return {"row": self._defended(seed, spec).measure()}
            except OutOfReach as error:
                return {"row": {"settings": spec, "unreachable": str(error)}}

        file = self._folder(seed, spec) / "released.json"
        row = step(file, _digest(self._identity(seed, spec)), make)["row"]
        about = {"method": self.subject.method, "agreement": self.subject.agreement}
        result = released({**self._row_key(seed, spec), **about, **row})
        if result.unreachable:
            self._log_line(seed, f"{spec}: {result.unreachable}")
        return result

    def attack(self, seed: int, spec: str, text: str, budget: int, clone: str) -> Cell:
        """The attack ``text`` on the victim behind the defense ``spec``.

        Args:
            seed: of the attack.
            spec, text: of defense and attack, see :class:`Grid`.
            budget: queries.
            clone: name of the clone's network.
        """
        attack = self.context.grid.attack(text, budget, seed)
        key = self._identity(seed, spec)
        key |= {"attack": type(attack).__name__, **attack.to_dict(), "clone": clone}
        if owns(text):
            key["labeled"] = self.context.grid.labeled
        digest = _digest(key)
        work = self._folder(seed, spec) / _file_name(f"{text}-{budget}-{clone}")
        about = {"attack": text, "budget": budget, "clone": clone}

        def make() -> dict[str, Any]:
            context, ready = self.context, attack
            if isinstance(ready, LabeledAttack) and ready.owns:
                ready = ready.owning(context.labeled(seed))
            network, holdout = context.clone(clone, seed), context.holdout(seed)
            defended = self._defended(seed, spec)
            return {**about, "row": run_attack(ready, defended, network, holdout, work / digest)}

        row = step(work.with_name(work.name + ".json"), digest, make)["row"]
        shutil.rmtree(work, ignore_errors=True)  # the checkpoints
        self._log_line(
            seed,
            f"{spec} <- {text} {budget} {clone}: clone {row['accuracy']:.2%}, fidelity "
            f"{row['fidelity']:.2%}, {row['seconds']:.0f} s",
        )
        return Cell(**{**self._row_key(seed, spec), **row, **about})

    def _defend(self, seed: int, spec: str) -> Defended:
        context, fitted = self.context, self._fitted.setdefault(seed, {})
        surrogate = functools.partial(context.network, context.grid.surrogate)
        return defend(spec, self.deployed, context.splits.train, surrogate, seed, fitted)

    def _identity(self, seed: int, spec: str) -> dict[str, Any]:
        """What identifies the victim behind a defense, for the digest of a part."""
        grid = self.context.grid
        key = {"victim": self.deployed.source, "defense": spec, "surrogate": grid.surrogate}
        return key | {"seed": seed, "data": self.context.data, "holdout": grid.holdout}

    def _row_key(self, seed: int, spec: str) -> dict[str, Any]:
        return {"seed": seed, "victim": self.subject.name, "defense": spec}

    def _folder(self, seed: int, *spec: str) -> Path:
        parts = (f"seed{seed}", *map(_file_name, (self.subject.name, *spec)))
        return self.context.out.joinpath("cells", *parts)

    def _log_line(self, seed: int, line: str) -> None:
        self.context.log(f"[seed {seed} {self.subject.name}] {line}")


def folder_key(subject: Subject) -> tuple[str, int | None]:
    """Name and seed of a victim's folder, which no two victims of an evaluation may share, also on
    file systems that ignore case."""
    return _file_name(subject.name).lower(), subject.seed


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text)


def _digest(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
