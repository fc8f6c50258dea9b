"""The trainings of a job or a study: the same networks for every seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from divqat._util.names import check_name
from divqat._util.settings import ConfigError, check_keys
from divqat.train import TrainConfig
from divqat.train.config import QUANTIZATION, SHARED
from divqat.train.methods import METHODS

NAMED = ("teacher", "reference")  # what a victim says by another's name
SET_BY_JOB = ("seed", *NAMED)
METHODS_OF_VICTIMS = tuple(name for name in METHODS if name != "fp")


@dataclass(frozen=True)
class Trainings:
    """What is trained.

    Attributes:
        seeds: one whole experiment for each.
        common: keys of :class:`TrainConfig` for all trainings.
        fp: keys for the full-precision training.
        victims: by name of the run folder, ``method`` (any but fp), ``teacher`` (the name of a
            ``nasty`` or ``ini`` victim further up; left out: fp, or for ``ini`` none),
            ``reference`` (the name of a ``qat`` victim further up, that an ``accuracy_budget``
            counts from) and other keys. A victim of method nasty or ini is trained, but neither
            exported nor attacked: the int8 models made from it are.

    Raises:
        ConfigError: an unknown key or a bad value, anywhere, or settings of a victim that do not
            fit those of its teacher or its reference.
    """

    seeds: list[int]
    common: dict[str, Any]
    fp: dict[str, Any]
    victims: dict[str, dict[str, Any]]

    @staticmethod
    def sections(data: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes from the content of a YAML file; what is left out has its default."""
        victims = data.get("victims") or {}
        if not isinstance(victims, Mapping) or not victims:
            raise ConfigError(f"victims: wanted at least one 'name: settings', got {victims!r}")
        return {
            "seeds": data.get("seeds", [0]),
            "common": data.get("common") or {},
            "fp": data.get("fp") or {},
            "victims": {name: settings or {} for name, settings in victims.items()},
        }

    def __post_init__(self) -> None:
        if (
            not isinstance(self.seeds, list)
            or not self.seeds
            or any(type(seed) is not int or seed < 0 for seed in self.seeds)
            or len(set(self.seeds)) < len(self.seeds)
        ):
            raise ConfigError(f"seeds: wanted a list of different numbers, got {self.seeds!r}")
        for name in self.victims:
            if name == "fp":
                raise ConfigError("victims: wanted names of folders other than fp, got 'fp'")
            try:
                check_name("victims", name)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        for where, section in {"common": self.common, "fp": self.fp, **self.victims}.items():
            check_keys(section, [spec.name for spec in fields(TrainConfig)], where=where)
            for key in SET_BY_JOB:
                if key in section and not (key in NAMED and where in self.victims):
                    raise ConfigError(f"{where}: the study sets {key} itself, remove it")
        self._check_methods()
        for seed in self.seeds:
            for name in self.names:
                self.training(name, seed, Path())
        for name in self.victims:
            self._check_alike(name)

    def _check_methods(self) -> None:
        """That each victim's teacher and reference are trained before it, and that there is one to
        attack."""
        if self.fp.get("method", "fp") != "fp":
            raise ConfigError(f"fp: method: wanted fp, got {self.fp['method']!r}")
        teachers, references = ["fp"], list[str]()
        for name, own in self.victims.items():
            method = own.get("method")
            if method not in METHODS_OF_VICTIMS:
                raise ConfigError(
                    f"{name}: method: wanted one of {', '.join(METHODS_OF_VICTIMS)}, got {method!r}"
                )
            if self.teacher(name) not in teachers:
                raise ConfigError(
                    f"{name}: teacher: wanted fp, or a nasty or ini victim further up, "
                    f"got {self.teacher(name)!r}"
                )
            if own.get("reference") not in (None, *references):
                raise ConfigError(
                    f"{name}: reference: wanted a qat victim further up, got {own['reference']!r}"
                )
            if method == "qat":
                references.append(name)
            if not METHODS[method].quantized:
                teachers.append(name)
        if not self.attacked:
            raise ConfigError("victims: wanted one that is quantized, to attack it, got none")

    def _check_alike(self, name: str) -> None:
        """What a training would refuse only when its teacher and its reference are trained."""
        own = self.training(name, self.seeds[0], Path())
        others: dict[str, tuple[str, tuple[str, ...]]] = {}
        if own.kind.taught:
            others["teacher"] = self.teacher(name), SHARED
        if own.reference is not None:
            others["reference"] = self.victims[name]["reference"], (*SHARED, *QUANTIZATION)
        for role, (other, settings) in others.items():
            theirs = self.training(other, self.seeds[0], Path())
            for setting in settings:
                wanted, got = getattr(theirs, setting), getattr(own, setting)
                if wanted != got and setting != "data_root":
                    raise ConfigError(
                        f"{name}: {setting}: wanted {wanted} as in its {role} {other}, got {got}"
                    )
            if role == "reference" and self.teacher(other) != self.teacher(name):
                raise ConfigError(
                    f"{name}: reference: wanted a victim of the teacher {self.teacher(name)}, got "
                    f"{other}, of the teacher {self.teacher(other)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """All trainings, each after those that it needs."""
        return ("fp", *self.victims)

    @property
    def attacked(self) -> list[str]:
        """The names of the victims that are exported and attacked."""
        return [name for name, own in self.victims.items() if METHODS[own["method"]].quantized]

    def teacher(self, name: str) -> str:
        """The name of the full-precision training that a victim learns from."""
        return self.victims[name].get("teacher", "fp")

    def needs(self, name: str) -> list[str]:
        """The names of the trainings that one begins with or counts from."""
        if name == "fp" or not METHODS[self.victims[name]["method"]].taught:
            return []
        others = [self.teacher(name), self.victims[name].get("reference")]
        return [other for other in others if other is not None]

    def training(self, name: str, seed: int, out: Path) -> TrainConfig:
        """The settings of ``fp`` or of a victim."""
        own = {"method": "fp", **self.fp} if name == "fp" else self.victims[name]
        settings = {**self.common, **own, "seed": seed}
        if name != "fp" and METHODS[own["method"]].taught:
            settings["teacher"] = str(self.folder(out, seed, self.teacher(name)))
            if "reference" in own:
                settings["reference"] = str(self.folder(out, seed, own["reference"]))
        return TrainConfig.from_dict(settings, where=name)

    @staticmethod
    def folder(out: Path, seed: int, name: str) -> Path:
        """The run folder of a training."""
        return out / f"seed{seed}" / name
