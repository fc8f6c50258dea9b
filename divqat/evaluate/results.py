"""The results of an evaluation: the schema of ``OUT/evaluation.json``.

The file holds ``Evaluation.to_dict()`` and its checksum. It has three flat lists of rows: victims
behind defenses, attacks on them, and the calibration and robustness of the victims. Shares are
fractions in [0, 1]; there is no NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from divqat._util.files import read_json, write_json
from divqat._util.rows import made
from divqat.evaluate.specs import is_alone, split_spec, steals
from divqat.metrics import Confidence

SOFT, HARD = "as_given", "label"  # values of KnockoffNets' setting ``reading``
EVALUATION = "evaluation.json"
R = TypeVar("R", "Released", "Cell", "SideEffects")


@dataclass(frozen=True, kw_only=True)
class Released:
    """A victim behind a defense, before any attack."""

    seed: int
    victim: str  # name
    method: str  # fp, qat, divqat ...; "qat" is the undefended control
    defense: str  # spec
    settings: str  # of the defense, including its strength
    unreachable: str = ""  # why no strength gives the wanted L1 distance; then all below is None
    accuracy: float | None = None  # of the deployed model, on the test set
    released_accuracy: float | None = None  # of the largest released entry
    top1_kept: float | None = None  # share of test images whose top-1 class the defense keeps
    top1_kept_queries: float | None = None  # share of queries
    l1_test: float | None = None  # mean L1 distance from clean to released answers
    l1_queries: float | None = None
    microseconds: float | None = None  # time of the defense per query
    distributions: bool | None = None  # released answers are non-negative and sum to 1
    deterministic: bool | None = None  # the same images got the same answers twice
    agreement: float | None = None  # argmax agreement of the trained and the deployed model
    test: Confidence | None = None  # of the released answers to test images
    queries: Confidence | None = None  # and to the query set


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attack; accuracies are those of the clone on the test set."""

    seed: int
    victim: str
    defense: str  # spec
    attack: str  # spec
    clone: str
    budget: int
    accuracy: float  # after the last epoch
    fidelity: float  # same top-1 as the deployed model behind the defense
    holdout_accuracy: float  # on the attacker's labeled images
    curve: list[float]  # after each epoch or round, on the first 2,000 test images
    queries: int
    seconds: float

    @property
    def gain(self) -> float:
        """Accuracy that choosing the best epoch on these test images would add; an attacker, who
        does not have them, cannot do that."""
        return max(self.curve) - self.curve[-1]

    @property
    def reading(self) -> str | None:
        """The setting ``reading`` of plain KnockoffNets; None for any other attack."""
        name, settings = split_spec(self.attack)
        return settings.get("reading", SOFT) if name == "knockoff" else None


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Accuracy of a deployed model on adversarial test images."""

    epsilon: float  # largest change of a pixel, as a fraction of its range
    images: int
    fgsm: float
    pgd: float


@dataclass(frozen=True, kw_only=True)
class SideEffects:
    """Calibration and robustness of a deployed model on the test set, without a defense in front
    of it."""

    seed: int
    victim: str
    accuracy: float
    ece: float  # expected calibration error, see divqat.metrics.calibration
    top_probability: float  # mean
    adversarial: list[Adversarial] = field(default_factory=list)  # empty: not measured

    def __str__(self) -> str:
        moved = (
            f", FGSM {row.fgsm:.2%} and PGD {row.pgd:.2%} at {epsilon_text(row.epsilon)}"
            for row in self.adversarial
        )
        return f"accuracy {self.accuracy:.2%}, calibration error {self.ece:.2%}{''.join(moved)}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The content of ``evaluation.json``."""

    dataset: str
    num_classes: int
    chance: float  # test accuracy of always predicting the most frequent class
    query_images: int  # size of the query set
    overlap: dict[str, int]  # number of images of one set that are in another, by "a in b"
    grid: dict[str, Any]
    deployed: str  # description of the victims
    command: str
    date: str  # ISO 8601
    versions: dict[str, str]
    hardware: str
    released: list[Released]
    cells: list[Cell]
    side_effects: list[SideEffects] = field(default_factory=list)  # absent from older files

    @property
    def budget(self) -> int:
        """The largest query budget, which the tables show."""
        return max((cell.budget for cell in self.cells), default=self.query_images)

    @property
    def control(self) -> str | None:
        """The victim with which all are compared: the first of method ``qat``, else the only
        one; None if there are several others."""
        names = list(dict.fromkeys(row.victim for row in self.released))
        plain = [row.victim for row in self.released if row.method == "qat"]
        return plain[0] if plain else names[0] if len(names) == 1 else None

    def select(self, rows: Iterable[R], **wanted: object) -> list[R]:
        """The rows whose fields equal ``wanted``."""
        return [
            row
            for row in rows
            if all(getattr(row, name) == value for name, value in wanted.items())
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """(victim, defense), in the order of their first appearance."""
        return list(dict.fromkeys((row.victim, row.defense) for row in self.released))

    def per_seed(
        self, victim: str, defense: str, pick: Callable[[list[Cell]], Cell | None]
    ) -> list[Cell]:
        """The cell that ``pick`` chooses among each seed's attacks at the largest budget."""
        cells = self.select(self.cells, victim=victim, defense=defense, budget=self.budget)
        picks = (pick(self.select(cells, seed=seed)) for seed in sorted({c.seed for c in cells}))
        return [cell for cell in picks if cell is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write ``evaluation.json`` atomically; NaN and Inf are refused."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read ``evaluation.json``.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is not an evaluation.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no evaluation at {path}: divqat run, study and evaluate write one"
            )
        data = read_json(path)
        try:
            rows = {
                "released": [released(row) for row in data["released"]],
                "cells": [made(Cell, row) for row in data["cells"]],
                "side_effects": [side_effects(row) for row in data.get("side_effects", [])],
            }
            return made(cls, {**data, **rows})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a divqat evaluation: {error}") from error


def released(data: dict[str, Any]) -> Released:
    """A row of ``released`` from plain data."""
    nested = {key: made(Confidence, data[key]) for key in ("test", "queries") if data.get(key)}
    return made(Released, {**data, **nested})


def side_effects(data: dict[str, Any]) -> SideEffects:
    """A row of ``side_effects`` from plain data."""
    adversarial = [made(Adversarial, row) for row in data["adversarial"]]
    return made(SideEffects, {**data, "adversarial": adversarial})


def epsilon_text(epsilon: float) -> str:
    """``8/255`` if it is a whole number of grey levels, else the number itself."""
    levels = round(255 * epsilon)
    return f"{levels}/255" if abs(255 * epsilon - levels) < 0.005 else f"{epsilon:g}"


def reads(reading: str) -> Callable[[list[Cell]], Cell | None]:
    """A function that picks plain KnockoffNets with this ``reading``; of several, the clone that is
    most accurate on the holdout."""
    return lambda cells: max(
        (cell for cell in cells if cell.reading == reading),
        key=lambda cell: cell.holdout_accuracy,
        default=None,
    )


def best_of(cells: list[Cell]) -> Cell | None:
    """The attack whose clone is most accurate on the attacker's labeled images; of equals the
    first. Attacks that take nothing from the victim do not count."""
    return max(
        (cell for cell in cells if steals(cell.attack)),
        key=lambda cell: cell.holdout_accuracy,
        default=None,
    )


def best_alone(cells: list[Cell]) -> Cell | None:
    """Likewise among the attackers with labeled images who take nothing from the victim."""
    return max(
        (cell for cell in cells if is_alone(cell.attack)),
        key=lambda cell: cell.holdout_accuracy,
        default=None,
    )
