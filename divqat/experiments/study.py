"""A study: train every victim with every seed, deploy it, and evaluate all of them.

OUT/config.yaml
OUT/seed<n>/<name>/   a training, and what is exported of it
OUT/…                 what divqat.evaluate.run writes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from divqat._util.bounds import check_tree
from divqat._util.foreign import trust, trusted
from divqat._util.held import held
from divqat._util.settings import ConfigError, check_keys, write_yaml
from divqat.evaluate import Evaluation, Grid, evaluate
from divqat.experiments.deploy import AttackConfig, answer_arguments
from divqat.experiments.side_by_side import side_by_side
from divqat.experiments.subjects import kind_of, subject_of
from divqat.experiments.trainings import Trainings
from divqat.train import Run, load_run, train
from divqat.train.folder import load_splits

SECTIONS = ("seeds", "common", "fp", "victims", "subjects", "evaluate", "attack")
OLD = "result.json"  # what jobs wrote before they were studies


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
    own = [f"{key}={given[key]}" for key in ("momentum", "weight_decay") if key in given]
    return {
        "attacks": [_knockoff(answer, own) for answer in answers],
        "clones": [config.clone],
        "query_limit": config.budget,
        "epsilons": [],
        **{key: value for key, value in given.items() if key in Grid.names()},
    }


def _knockoff(answer: str, settings: list[str]) -> str:
    """The spec of KnockoffNets that learns from these answers."""
    reading = [] if answer == "probs" else [f"reading={answer}"]
    return ":".join(filter(None, ["knockoff", ",".join(reading + settings)]))


def run_study(
    study: Study,
    out: str | Path,
    *,
    jobs: int = 1,
    command: str = "",
    log: Callable[[str], object] = print,
) -> Evaluation:
    """Do what is left of a study, and write the report.

    Everything that is finished in ``out`` is kept, a killed part goes on where it was. Seeds,
    victims, attacks and defenses can be added to a finished study.

    Args:
        study: the settings.
        out: the folder of the study; made if it does not exist.
        jobs: so many seeds at a time, each in a process of its own, whose lines are printed. The
            seconds that are measured then are those with company.
        command: what the report says made it.
        log: takes a line per epoch and attack.

    Raises:
        ValueError: a training in ``out`` has other settings.
        Others: as :func:`divqat.train.train`, :func:`divqat.evaluate.evaluate` and, of
            several jobs, :func:`divqat.experiments.side_by_side.side_by_side`.
    """
    with held("out", out) as folder:
        check_tree(folder)
        if (folder / OLD).is_file():
            raise ValueError(
                f"{out} holds a job of an older divqat, whose results are in {OLD}: choose another "
                f"--out, or move {OLD} elsewhere, and the trainings in {out} are taken over"
            )
        return _run_study(study, folder, jobs, command, log)


def _run_study(
    study: Study, out: Path, jobs: int, command: str, log: Callable[[str], object]
) -> Evaluation:
    # Now: that something is missing should be known before hours of training.
    splits = load_splits(study.training("fp", study.seeds[0], out))
    queries = study.grid.queries(splits)
    study.grid.check(splits, len(queries))
    write_yaml(out / "config.yaml", asdict(study))
    if jobs > 1 and len(study.seeds) > 1:  # what is left after that is to read what they wrote
        side_by_side(_seed, [(study, seed, out, trusted()) for seed in study.seeds], jobs)
    runs = [run for seed in study.seeds for run in _trained(study, seed, out, log)]
    return evaluate(
        [subject_of(run, splits, name=name) for name, run in runs],
        splits,
        study.grid,
        out,
        queries=queries,
        command=command,
        deployed="; ".join(dict.fromkeys(kind_of(run) for _, run in runs)),
        log=log,
    )


def _trained(
    study: Study, seed: int, out: Path, log: Callable[[str], object]
) -> Iterator[tuple[str, Run]]:
    """Train what is left of a seed; name and run of all that is evaluated."""
    for name in ("fp", *study.victims):
        folder = study.folder(out, seed, name)

        def say(line: str, where: str = f"[seed {seed} {name}]") -> None:
            log(f"{where} {line}")

        train(study.training(name, seed, out), folder, log=say)
        if name in (study.subjects or study.attacked):
            yield name, load_run(folder)


def _seed(study: Study, seed: int, out: Path, names: tuple[str, ...]) -> None:
    """All of a seed but the report; ``names`` are trusted, as they are in the first process."""
    with trust(*names):
        splits = load_splits(study.training("fp", seed, out))
        subjects = [
            subject_of(run, splits, name=name) for name, run in _trained(study, seed, out, _print)
        ]
        evaluate(subjects, splits, study.grid, out, report=False, log=_print)


def _print(line: str) -> None:
    """Print a whole line at once, as other processes print, too."""
    print(f"{line}\n", end="", flush=True)
