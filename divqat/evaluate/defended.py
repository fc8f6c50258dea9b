"""A deployed model behind a defense, and the answers that it releases."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.seeds import derived_seed
from divqat.data import LabeledImages, to_float
from divqat.defenses import Defense, Owner, calibrated, l1_distance
from divqat.evaluate.specs import make_defense
from divqat.evaluate.subject import Deployed
from divqat.metrics import Confidence, accuracy, are_distributions, fidelity
from divqat.victim import Victim

CALIBRATION_IMAGES = 2048  # queries on which the strength of a defense is chosen
DETERMINISM_IMAGES = 256


class OutOfReach(ValueError):
    """No strength of a defense gives the wanted L1 distance."""


@dataclass(frozen=True, eq=False)
class Defended:
    """A model whose probabilities pass through ``defense`` before they are released."""

    deployed: Deployed
    defense: Defense | None

    def victim(self, query_budget: int | None = None) -> Victim:
        """The black box, with a copy of the defense that remembers no queries."""
        model, defense = self.deployed.model, copy.deepcopy(self.defense)
        return Victim(model, defense=defense, query_budget=query_budget)

    @functools.cached_property
    def test_answers(self) -> Tensor:
        """The released answers to the test images, [N, num_classes]."""
        return self.release(self.deployed.test.images, self.deployed.test_logits)

    def release(self, images: Tensor, logits: Tensor) -> Tensor:
        """The answers released for uint8 ``images`` with these ``logits``, both of N rows:
        [N, num_classes]."""
        probs, defense = logits.softmax(1), copy.deepcopy(self.defense)
        if defense is None:
            return probs
        batches = zip(probs.split(256), images.split(256), strict=True)
        return torch.cat([defense(p, to_float(x)) for p, x in batches])

    def measure(self) -> dict[str, Any]:
        """The measured fields of :class:`divqat.evaluate.results.Released`."""
        deployed, labels = self.deployed, self.deployed.test.labels
        clean = [logits.softmax(1) for logits in (deployed.test_logits, deployed.model.logits)]
        start = time.perf_counter()
        released = [self.test_answers, self.release(deployed.queries, deployed.model.logits)]
        seconds = time.perf_counter() - start
        # The model itself: one with cached answers would be deterministic in any case.
        victim = Victim(deployed.subject.model, defense=copy.deepcopy(self.defense))
        repeated = to_float(deployed.queries[:DETERMINISM_IMAGES])
        return {
            "settings": str(self.defense or "none"),
            "accuracy": accuracy(clean[0], labels),
            "released_accuracy": accuracy(released[0], labels),
            "top1_kept": fidelity(released[0], clean[0]),
            "top1_kept_queries": fidelity(released[1], clean[1]),
            "l1_test": l1_distance(released[0], clean[0]),
            "l1_queries": l1_distance(released[1], clean[1]),
            "microseconds": 1e6 * seconds / sum(map(len, released)) if self.defense else 0.0,
            "distributions": all(map(are_distributions, released)),
            "deterministic": torch.equal(victim(repeated), victim(repeated)),
            "test": asdict(Confidence.of(released[0])),
            "queries": asdict(Confidence.of(released[1])),
        }


def defend(
    spec: str,
    deployed: Deployed,
    train: LabeledImages,
    build: Callable[[], nn.Module],
    seed: int,
    fitted: dict[str, Defense],
) -> Defended:
    """Fit the defense of a spec, with the strength that gives the spec's L1 distance, if any.

    ``fitted`` caches fitted defenses, before their strength is chosen, so that their networks are
    trained only once.

    Raises:
        ConfigError: see :func:`divqat.evaluate.specs.make_defense`.
        OutOfReach: no strength gives that distance.
    """
    defense, l1 = make_defense(spec)
    if defense is None:
        return Defended(deployed, None)
    key = str(defense)
    if key not in fitted:
        with torch.random.fork_rng([]):
            torch.manual_seed(derived_seed(seed, "defense", key))
            fitted[key] = defense.fit(Owner(train, deployed.model, build, seed))
    defense = copy.deepcopy(fitted[key])
    if l1 is not None:
        images = deployed.queries[:CALIBRATION_IMAGES]
        probs = deployed.model.logits[: len(images)].softmax(1)
        try:
            defense = calibrated(defense, probs, to_float(images), l1)
        except ValueError as error:
            raise OutOfReach(str(error)) from error
    return Defended(deployed, defense)
