"""The settings of a study: victims, seeds, and what is tried on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from divqat._util.settings import ConfigError, check_keys
from divqat.evaluate import Grid
from divqat.experiments.deploy import AttackConfig, answer_arguments
from divqat.experiments.trainings import Trainings

SECTIONS = ("seeds", "common", "fp", "victims", "subjects", "evaluate", "attack")


@dataclass(frozen=True)
class Study(Trainings):
    """The settings of a study, as its YAML file holds them.

    Attributes:
        subjects: the trainings that are evaluated, by name, ``fp`` among them if wanted; empty: all
            that are quantized.
        evaluate: keys of :class:`divqat.evaluate.Grid` (in the file, ``attack`` can take its place,
            see :func:`short_grid`), but ``seeds``: a victim is attacked with the seed that it was
            trained with.
        Others: see :class:`Trainings`.

    Raises:
        ConfigError: an unknown key or a bad value, anywhere.
    """

    subjects: list[str]
    evaluate: dict[str, Any]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """From the content of a YAML file; what is left out has its default."""
        check_keys(data, SECTIONS)
        if "attack" in data and "evaluate" in data:
            raise ConfigError("attack: wanted it or evaluate, whose short form it is, got both")
        subjects, grid = data.get("subjects") or [], data.get("evaluate") or {}
        if "attack" in data:
            grid = short_grid(data["attack"] or {})
        return cls(**cls.sections(data), subjects=subjects, evaluate=grid)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.names
        if not isinstance(self.subjects, list) or not set(self.subjects) <= set(known):
            raise ConfigError(f"subjects: wanted some of {', '.join(known)}, got {self.subjects!r}")
        check_keys(self.evaluate, Grid.names(), where="evaluate")
        if "seeds" in self.evaluate:
            raise ConfigError("evaluate: the study sets seeds itself, remove it")
        self.grid  # noqa: B018 (its values are checked)

    @property
    def evaluated(self) -> list[str]:
        """The names of the trainings that are evaluated."""
        return self.subjects or self.attacked

    @property
    def grid(self) -> Grid:
        """What is tried."""
        return Grid.from_dict(self.evaluate, where="evaluate")


def short_grid(attack: Mapping[str, Any]) -> dict[str, Any]:
    """The ``evaluate`` that ``attack`` is short for: KnockoffNets from each of ``answers``.

    Args:
        attack: keys of :class:`divqat.experiments.deploy.AttackConfig` but ``seed``, and
            ``answers``: a list of ``probs``, ``label``, ``top3``, ``rounded2`` ...

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    check_keys(attack, [*AttackConfig.names(), "answers"], where="attack")
    if "seed" in attack:
        raise ConfigError("attack: the study sets seed itself, remove it")
    answers = attack.get("answers", ["probs", "label"])
    if not isinstance(answers, list) or not answers:
        raise ConfigError(f"attack.answers: wanted a list, got {answers!r}")
    for answer in answers:
        answer_arguments(answer)
    given = {key: value for key, value in attack.items() if key != "answers"}
    config = AttackConfig.from_dict(given, where="attack")
    return {
        "attacks": [_knockoff(answer) for answer in answers],
        "clones": [config.clone],
        "query_limit": config.budget,
        "epsilons": [],
        **{key: value for key, value in given.items() if key in Grid.names()},
    }


def _knockoff(answer: str) -> str:
    """The spec of KnockoffNets that learns from these answers."""
    return "knockoff" if answer == "probs" else f"knockoff:reading={answer}"
