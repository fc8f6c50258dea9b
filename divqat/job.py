"""The settings of a whole job: what the YAML file of ``divqat run`` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from divqat.options import ConfigError, check_keys
from divqat.steps import AttackConfig, answer_arguments
from divqat.trainings import Trainings

SECTIONS = ("seeds", "common", "fp", "victims", "attack")


@dataclass(frozen=True)
class Job(Trainings):
    """The settings of a job, as its YAML file holds them.

    Attributes:
        attack: keys of :class:`AttackConfig`, and ``answers``: a list of ``probs``, ``label``,
            ``top3``, ``rounded2`` ...
        Others: see :class:`Trainings`.

    Raises:
        ConfigError: an unknown key or a bad value, anywhere.
    """

    attack: dict[str, Any]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """From the content of a YAML file; what is left out has its default."""
        check_keys(data, SECTIONS)
        attack = {"answers": ["probs", "label"], **(data.get("attack") or {})}
        return cls(**cls.sections(data), attack=attack)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.answers, list) or not self.answers:
            raise ConfigError(f"attack.answers: wanted a list, got {self.answers!r}")
        for answer in self.answers:
            answer_arguments(answer)
        for seed in self.seeds:
            self.attacker(seed)

    def attacker(self, seed: int) -> AttackConfig:
        """The settings of the attack."""
        settings = {key: value for key, value in self.attack.items() if key != "answers"}
        if "seed" in settings:
            raise ConfigError("attack: the job sets seed itself, remove it")
        return AttackConfig.from_dict({**settings, "seed": seed}, where="attack")

    @property
    def answers(self) -> list[str]:
        """What the victims show, one attack for each."""
        return self.attack["answers"]
