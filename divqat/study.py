"""A study: train every victim with every seed, deploy it, and evaluate all of them.

OUT/config.yaml
OUT/seed<n>/<name>/   a training, and what is exported of it
OUT/…                 what divqat.evaluate.grid.run writes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from divqat.evaluate.grid import Evaluation, Grid, Subject, evaluate
from divqat.options import ConfigError, check_keys, write_yaml
from divqat.subjects import kind_of, subject_of
from divqat.train import load_run, train
from divqat.train.folder import load_splits
from divqat.trainings import Trainings

SECTIONS = ("seeds", "common", "fp", "victims", "subjects", "evaluate")


@dataclass(frozen=True)
class Study(Trainings):
    """The settings of a study, as its YAML file holds them.

    Attributes:
        subjects: the trainings that are evaluated, by name, ``fp`` among them if wanted; empty: all
            that are quantized.
        evaluate: keys of :class:`divqat.evaluate.grid.Grid`, but ``seeds``: a victim is attacked
            with the seed that it was trained with.
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
        subjects, grid = data.get("subjects") or [], data.get("evaluate") or {}
        return cls(**cls.sections(data), subjects=subjects, evaluate=grid)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ["fp", *self.victims]
        if not isinstance(self.subjects, list) or not set(self.subjects) <= set(known):
            raise ConfigError(f"subjects: wanted some of {', '.join(known)}, got {self.subjects!r}")
        check_keys(self.evaluate, Grid.names(), where="evaluate")
        if "seeds" in self.evaluate:
            raise ConfigError("evaluate: the study sets seeds itself, remove it")
        self.grid  # noqa: B018 (its values are checked)

    @property
    def grid(self) -> Grid:
        """What is tried."""
        return Grid.from_dict(self.evaluate, where="evaluate")


def run_study(
    study: Study, out: str | Path, *, command: str = "", log: Callable[[str], object] = print
) -> Evaluation:
    """Do what is left of a study, and write the report.

    Everything that is finished in ``out`` is kept, a killed part goes on where it was. Seeds,
    victims, attacks and defenses can be added to a finished study.

    Args:
        study: the settings.
        out: the folder of the study; made if it does not exist.
        command: what the report says made it.
        log: takes a line per epoch and attack.

    Raises:
        ValueError: a training in ``out`` has other settings.
        Others: as :func:`divqat.train.train` and :func:`divqat.evaluate.grid.evaluate`.
    """
    out = Path(out)
    # Now: that something is missing should be known before hours of training.
    splits = load_splits(study.training("fp", study.seeds[0], out))
    study.grid.check(splits)
    queries = study.grid.queries(splits)
    write_yaml(out / "config.yaml", asdict(study))
    subjects: list[Subject] = []
    kinds: list[str] = []
    for seed in study.seeds:
        for name in ("fp", *study.victims):
            folder = study.folder(out, seed, name)

            def say(line: str, where: str = f"[seed {seed} {name}]") -> None:
                log(f"{where} {line}")

            train(study.training(name, seed, out), folder, log=say)
            if name in (study.subjects or study.attacked):
                run = load_run(folder)
                subjects.append(subject_of(run, splits, name=name))
                kinds.append(kind_of(run))
    deployed = "; ".join(dict.fromkeys(kinds))
    return evaluate(
        subjects,
        splits,
        study.grid,
        out,
        queries=queries,
        command=command,
        deployed=deployed,
        log=log,
    )
