"""The settings of a study: victims, seeds, attacks and defenses."""

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
    """The settings of a study, as in its YAML file.

    Attributes:
        subjects: names of the trainings to evaluate, which may include ``fp``; empty: all quantized
            ones.
        evaluate: keys of :class:`divqat.evaluate.Grid` except ``seeds``, as a victim is attacked
            with the seed of its training. The file may have ``attack`` instead, see
            :func:`short_grid`.
        Others: see :class:`Trainings`.

    Raises:
        ConfigError: an unknown key or an invalid value.
    """

    subjects: list[str]
    evaluate: dict[str, Any]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """From the content of a YAML file; missing keys get their defaults."""
        check_keys(data, SECTIONS)
        if "attack" in data and "evaluate" in data:
            raise ConfigError(
                "attack: wanted either it or evaluate, of which it is the short form, got both"
            )
        subjects, grid = data.get("subjects") or [], data.get("evaluate") or {}
        if "attack" in data:
            grid = short_grid(data["attack"] or {})
        return cls(**cls.sections(data), subjects=subjects, evaluate=grid)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.names
        if not isinstance(self.subjects, list) or not set(self.subjects) <= set(names):
            raise ConfigError(f"subjects: wanted some of {', '.join(names)}, got {self.subjects!r}")
        check_keys(self.evaluate, Grid.names(), where="evaluate")
        if "seeds" in self.evaluate:
            raise ConfigError("evaluate: the study sets seeds itself, remove it")
        self.grid  # noqa: B018 (the property checks the values)

    @property
    def evaluated(self) -> list[str]:
        """The names of the trainings to evaluate."""
        return self.subjects or self.attacked

    @property
    def grid(self) -> Grid:
        """The attacks and defenses of the evaluation."""
        return Grid.from_dict(self.evaluate, where="evaluate")


def short_grid(attack: Mapping[str, Any]) -> dict[str, Any]:
    """The long form (``evaluate``) of ``attack``: KnockoffNets with each kind of ``answers``.

    Args:
        attack: keys of :class:`divqat.experiments.deploy.AttackConfig` except ``seed``, and
            ``answers``: a list of ``probs``, ``label``, ``top3``, ``rounded2`` ...

    Raises:
        ConfigError: an unknown key or an invalid value.
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
    """The spec of KnockoffNets with answers of this kind."""
    return "knockoff" if answer == "probs" else f"knockoff:reading={answer}"
