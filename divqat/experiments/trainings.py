"""The trainings of a study: the same set for every seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from divqat._util.names import check_name
from divqat._util.settings import ConfigError, check_keys
from divqat.models.ensemble import MEMBERS
from divqat.train import TrainConfig
from divqat.train.config import QUANTIZATION, SHARED
from divqat.train.methods import METHODS

ROLES = ("teacher", "reference", "members")  # for which a victim names other trainings
SET_BY_STUDY = ("seed", *ROLES)
VICTIM_METHODS = tuple(name for name in METHODS if name != "fp")


@dataclass(frozen=True)
class Trainings:
    """The settings of all trainings.

    Attributes:
        seeds: all trainings are repeated for each.
        common: keys of :class:`TrainConfig` for all trainings.
        fp: keys for the full-precision training.
        victims: keys by name, which is also the name of the run folder: ``method`` (any but fp),
            ``teacher`` (the name of an earlier full-precision victim; default: fp, or none for
            ``ini``), ``reference`` (the name of an earlier ``qat`` victim, against which an
            ``accuracy_budget`` is measured), ``members`` (the names of earlier full-precision
            victims, for method ``ensemble``), and others. A victim with a full-precision method
            (nasty, ini, misleader, ensemble) is trained, but neither exported nor attacked; int8
            models made from it are.

    Raises:
        ConfigError: an unknown key or an invalid value, or settings of a victim that do not match
            those of its teacher or reference.
    """

    seeds: list[int]
    common: dict[str, Any]
    fp: dict[str, Any]
    victims: dict[str, dict[str, Any]]

    @staticmethod
    def sections(data: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes from the content of a YAML file; missing keys get their defaults."""
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
            for key in SET_BY_STUDY:
                if key in section and not (key in ROLES and where in self.victims):
                    raise ConfigError(f"{where}: the study sets {key} itself, remove it")
        self._check_methods()
        for seed in self.seeds:
            for name in self.names:
                self.training(name, seed, Path())
        for name in self.victims:
            self._check_match(name)

    def _check_methods(self) -> None:
        """Check that victims come after their teacher and reference, and that one is attacked."""
        if self.fp.get("method", "fp") != "fp":
            raise ConfigError(f"fp: method: wanted fp, got {self.fp['method']!r}")
        teachers, references = ["fp"], list[str]()
        for name, settings in self.victims.items():
            method = settings.get("method")
            if method not in VICTIM_METHODS:
                raise ConfigError(
                    f"{name}: method: wanted one of {', '.join(VICTIM_METHODS)}, got {method!r}"
                )
            if self.teacher(name) not in teachers:
                raise ConfigError(
                    f"{name}: teacher: wanted fp, or an earlier full-precision victim, got "
                    f"{self.teacher(name)!r}"
                )
            reference = settings.get("reference")
            if reference not in (None, *references):
                raise ConfigError(
                    f"{name}: reference: wanted an earlier qat victim, got {reference!r}"
                )
            if not isinstance(self.members(name), list):
                raise ConfigError(
                    f"{name}: members: wanted a list of names, got {self.members(name)!r}"
                )
            for member in self.members(name):
                if member not in teachers:
                    raise ConfigError(
                        f"{name}: members: wanted earlier full-precision victims, got {member!r}"
                    )
            if method == "qat":
                references.append(name)
            if not METHODS[method].quantized:
                teachers.append(name)
        if not self.attacked:
            raise ConfigError(
                "victims: wanted at least one that is quantized, to be attacked, got none"
            )

    def _check_match(self, name: str) -> None:
        """Check now what the training would refuse only after its teacher and reference have been
        trained."""
        config = self.training(name, self.seeds[0], Path())
        # role, name, settings
        others = [("members", other, config.shared) for other in self.members(name)]
        if config.kind.needs_teacher:
            others.append(("teacher", self.teacher(name), config.shared))
        if config.reference is not None:
            reference = self.victims[name]["reference"]
            others.append(("reference", reference, (*SHARED, *QUANTIZATION)))
        networks = [self.training(other, self.seeds[0], Path()).model for _, other, _ in others]
        if config.method == "ensemble" and networks != [*MEMBERS]:
            raise ConfigError(
                f"{name}: members: wanted networks {', '.join(MEMBERS)}, got {', '.join(networks)}"
            )
        for role, other, settings in others:
            other_config = self.training(other, self.seeds[0], Path())
            for setting in settings:
                wanted, got = getattr(other_config, setting), getattr(config, setting)
                if wanted != got and setting != "data_root":
                    raise ConfigError(
                        f"{name}: {setting}: wanted {wanted} as in its {role} {other}, got {got}"
                    )
            if role == "reference" and self.teacher(other) != self.teacher(name):
                raise ConfigError(
                    f"{name}: reference: wanted a victim with teacher {self.teacher(name)}, got "
                    f"{other} with teacher {self.teacher(other)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all trainings, each after those that it needs."""
        return ("fp", *self.victims)

    @property
    def attacked(self) -> list[str]:
        """The names of the victims that are exported and attacked."""
        return [name for name, keys in self.victims.items() if METHODS[keys["method"]].quantized]

    def teacher(self, name: str) -> str:
        """The name of a victim's teacher."""
        return self.victims[name].get("teacher", "fp")

    def members(self, name: str) -> list[str]:
        """The names of a victim's members."""
        return self.victims[name].get("members") or []

    def needs(self, name: str) -> list[str]:
        """The names of the training's teacher and reference or members, if it has them."""
        if name == "fp":
            return []
        if not METHODS[self.victims[name]["method"]].needs_teacher:
            return self.members(name)
        others = [self.teacher(name), self.victims[name].get("reference")]
        return [other for other in others if other is not None]

    def training(self, name: str, seed: int, out: Path) -> TrainConfig:
        """The settings of ``fp`` or of a victim."""
        keys = {"method": "fp", **self.fp} if name == "fp" else self.victims[name]
        settings = {**self.common, **keys, "seed": seed}
        if name != "fp" and METHODS[keys["method"]].needs_teacher:
            settings["teacher"] = str(self.folder(out, seed, self.teacher(name)))
            if "reference" in keys:
                settings["reference"] = str(self.folder(out, seed, keys["reference"]))
        if name != "fp" and self.members(name):
            settings["members"] = [
                str(self.folder(out, seed, member)) for member in self.members(name)
            ]
        return TrainConfig.from_dict(settings, where=name)

    @staticmethod
    def folder(out: Path, seed: int, name: str) -> Path:
        """The run folder of a training."""
        return out / f"seed{seed}" / name
