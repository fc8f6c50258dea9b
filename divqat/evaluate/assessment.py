"""One victim of an evaluation: every part of the work on it, each done once and kept as a file.

OUT/cells/seed<n>/<victim>/side-effects.json                         calibration, robustness
OUT/cells/seed<n>/<victim>/<defense>/released.json                   answers, before any attack
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
        splits: their data, as :meth:`Grid.measured` has it.
        queries: the attacker's images, uint8 [N, C, H, W].
        grid: what is tried.
        out: the folder of the evaluation.
        log: takes a line per part.
    """

    def __init__(self, splits: Splits, queries: Tensor, grid: Grid, out: Path, log: Log) -> None:
        self.splits, self.queries, self.grid, self.out, self.log = splits, queries, grid, out, log
        self.test = ImageSet(splits.test.images, splits.test.labels)
        self.data = data_fingerprint(splits, queries)  # in the identity of every part
        self.device = find_device(grid.device)

    def holdout(self, seed: int) -> ImageSet:
        """The attacker's labeled images that choose the best clone."""
        return self._labeled_images(seed, slice(self.grid.holdout))

    def labeled(self, seed: int) -> ImageSet:
        """Other labeled images, for the attacks that train on some."""
        start = self.grid.holdout
        return self._labeled_images(seed, slice(start, start + self.grid.labeled))

    def _labeled_images(self, seed: int, part: slice) -> ImageSet:
        validation = self.splits.validation
        generator = torch.Generator().manual_seed(derived_seed(seed, "holdout"))
        some = validation.subset(torch.randperm(len(validation), generator=generator)[part])
        return ImageSet(some.images, some.labels)

    def clone(self, name: str, seed: int) -> nn.Module:
        """An untrained clone."""
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
    """A victim, and what its parts share: its answers, and its defenses once they are fitted.

    A part whose file is there, made from the same victim, images and settings, is read from it.
    """

    def __init__(self, context: Context, subject: Subject) -> None:
        self.context, self.subject = context, subject
        self.deployed = Deployed(subject, context.queries, context.test)
        self._defended = functools.cache(self._defend)
        self._fitted: dict[int, dict[str, Defense]] = {}

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the attacks on it."""
        seed = self.subject.seed
        return tuple(range(self.context.grid.seeds)) if seed is None else (seed,)

    def side_effects(self, seed: int) -> SideEffects:
        """How calibrated and robust it is."""
        grid, gradients = self.context.grid, self.subject.gradients
        key: dict[str, Any] = {"victim": self.deployed.source, "seed": seed}
        key |= {"data": self.context.data}
        if gradients is not None:
            key |= {"gradients": fingerprint(gradients.state_dict())}
            key |= {"epsilons": grid.epsilons, "images": grid.adversarial_images}

        def make() -> dict[str, Any]:
            return {"row": measure(self.deployed, grid.epsilons, grid.adversarial_images, seed)}

        row = step(self._folder(seed) / "side-effects.json", _digest(key), make)["row"]
        found = side_effects({"seed": seed, "victim": self.subject.name, **row})
        self._log(seed, str(found))
        return found

    def released(self, seed: int, spec: str) -> Released:
        """What it answers behind a defense, before any attack."""

        def make() -> dict[str, Any]:
            try:
                return {"row": self._defended(seed, spec).measure()}
            except OutOfReach as error:
                return {"row": {"settings": spec, "unreachable": str(error)}}

        file = self._folder(seed, spec) / "released.json"
        row = step(file, _digest(self._key(seed, spec)), make)["row"]
        about = {"method": self.subject.method, "agreement": self.subject.agreement}
        found = released({**self._about(seed, spec), **about, **row})
        if found.unreachable:
            self._log(seed, f"{spec}: {found.unreachable}")
        return found

    def attack(self, seed: int, spec: str, text: str, budget: int, clone: str) -> Cell:
        """The attack ``text`` on it behind the defense ``spec``, whose answers are released."""
        attack = self.context.grid.attack(text, budget, seed)
        key = self._key(seed, spec)
        key |= {"attack": type(attack).__name__, **attack.to_dict(), "clone": clone}
        if owns(text):
            key["labeled"] = self.context.grid.labeled
        digest = _digest(key)
        work = self._folder(seed, spec) / _file_name(f"{text}-{budget}-{clone}")
        about = {"attack": text, "budget": budget, "clone": clone}

        def make() -> dict[str, Any]:
            context, own = self.context, attack
            if isinstance(own, LabeledAttack) and own.owns:
                own = own.owning(context.labeled(seed))
            network, holdout = context.clone(clone, seed), context.holdout(seed)
            defended = self._defended(seed, spec)
            return {**about, "row": run_attack(own, defended, network, holdout, work / digest)}

        row = step(work.with_name(work.name + ".json"), digest, make)["row"]
        shutil.rmtree(work, ignore_errors=True)  # the checkpoints
        self._log(
            seed,
            f"{spec} <- {text} {budget} {clone}: clone {row['accuracy']:.2%}, fidelity "
            f"{row['fidelity']:.2%}, {row['seconds']:.0f} s",
        )
        return Cell(**{**self._about(seed, spec), **row, **about})

    def _defend(self, seed: int, spec: str) -> Defended:
        context, fitted = self.context, self._fitted.setdefault(seed, {})
        surrogate = functools.partial(context.network, context.grid.surrogate)
        return defend(spec, self.deployed, context.splits.train, surrogate, seed, fitted)

    def _key(self, seed: int, spec: str) -> dict[str, Any]:
        """What identifies the victim behind a defense."""
        grid = self.context.grid
        key = {"victim": self.deployed.source, "defense": spec, "surrogate": grid.surrogate}
        return key | {"seed": seed, "data": self.context.data, "holdout": grid.holdout}

    def _about(self, seed: int, spec: str) -> dict[str, Any]:
        return {"seed": seed, "victim": self.subject.name, "defense": spec}

    def _folder(self, seed: int, *spec: str) -> Path:
        parts = (f"seed{seed}", *map(_file_name, (self.subject.name, *spec)))
        return self.context.out.joinpath("cells", *parts)

    def _log(self, seed: int, line: str) -> None:
        self.context.log(f"[seed {seed} {self.subject.name}] {line}")


def folder_key(subject: Subject) -> tuple[str, int | None]:
    """What no two victims of an evaluation may share: their folder, also where capitals make no
    difference."""
    return _file_name(subject.name).lower(), subject.seed


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text)


def _digest(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
