"""A deployed model behind a defense, and what that releases."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from divqat.data import ImageSet, LabeledImages, to_float
from divqat.defenses import Defense, Owner, calibrated, l1_distance
from divqat.evaluate.grid.specs import make_defense
from divqat.evaluate.grid.subject import Remembered
from divqat.evaluate.metrics import accuracy, are_distributions, fidelity
from divqat.evaluate.result import Confidence
from divqat.train.folder import derived_seed
from divqat.victim import Victim

CALIBRATION_IMAGES = 2048  # queries that a strength is chosen on
DETERMINISM_IMAGES = 256


class OutOfReach(ValueError):
    """No strength of a defense gives the wanted L1 distance."""


@dataclass(frozen=True, eq=False)
class Defended:
    """A model that releases what ``defense`` makes of its probabilities."""

    model: Remembered
    defense: Defense | None

    def victim(self, query_budget: int | None = None) -> Victim:
        """The black box; a defense that remembers queries has seen none."""
        return Victim(self.model, defense=copy.deepcopy(self.defense), query_budget=query_budget)

    def release(self, images: Tensor, logits: Tensor) -> Tensor:
        """What is released for uint8 ``images`` with these ``logits``, both of N rows: [N, C]."""
        probs, defense = logits.softmax(1), copy.deepcopy(self.defense)
        if defense is None:
            return probs
        parts = zip(probs.split(256), images.split(256), strict=True)
        return torch.cat([defense(part, to_float(some)) for part, some in parts])


def defend(
    spec: str,
    model: Remembered,
    queries: Tensor,  # uint8 [N, C, H, W]
    train: LabeledImages,
    build: Callable[[], nn.Module],
    seed: int,
    fitted: dict[str, Defense],
) -> Defended:
    """Set the defense of a spec up, at the wanted L1 distance on ``queries`` if it names one.

    ``fitted`` keeps defenses before their strength is chosen: networks are trained once for all.

    Raises:
        ConfigError: see :func:`divqat.evaluate.grid.specs.make_defense`.
        OutOfReach: no strength gives that distance.
    """
    defense, l1 = make_defense(spec)
    if defense is None:
        return Defended(model, None)
    key = str(defense)
    if key not in fitted:
        with torch.random.fork_rng([]):
            torch.manual_seed(derived_seed(seed, "defense", key))
            fitted[key] = defense.fit(Owner(train, model, build, seed))
    defense = copy.deepcopy(fitted[key])
    if l1 is not None:
        some = queries[:CALIBRATION_IMAGES]
        probs = model.logits[: len(some)].softmax(1)
        try:
            defense = calibrated(defense, probs, to_float(some), l1)
        except ValueError as error:
            raise OutOfReach(str(error)) from error
    return Defended(model, defense)


def measure(
    defended: Defended,
    test: ImageSet,
    test_logits: Tensor,  # [N, num_classes]
    queries: Tensor,  # uint8 [M, C, H, W]
) -> dict[str, Any]:
    """The measured fields of :class:`divqat.evaluate.grid.result.Released`."""
    logits = {"test": test_logits, "queries": defended.model.logits}
    images = {"test": test.images, "queries": queries}
    clean = {name: rows.softmax(1) for name, rows in logits.items()}
    shown = {"test": defended.release(images["test"], logits["test"])}
    start = time.perf_counter()
    shown["queries"] = defended.release(images["queries"], logits["queries"])
    seconds = time.perf_counter() - start
    some = to_float(queries[:DETERMINISM_IMAGES])
    victim = defended.victim()
    return {
        "settings": str(defended.defense or "none"),
        "accuracy": accuracy(clean["test"], test.labels),
        "released_accuracy": accuracy(shown["test"], test.labels),
        "top1_kept": fidelity(shown["test"], clean["test"]),
        "top1_kept_queries": fidelity(shown["queries"], clean["queries"]),
        "l1_test": l1_distance(shown["test"], clean["test"]),
        "l1_queries": l1_distance(shown["queries"], clean["queries"]),
        "microseconds": 1e6 * seconds / len(queries) if defended.defense else 0.0,
        "distributions": all(map(are_distributions, shown.values())),
        "deterministic": torch.equal(victim(some), victim(some)),
        "test": asdict(Confidence.of(shown["test"])),
        "queries": asdict(Confidence.of(shown["queries"])),
    }
