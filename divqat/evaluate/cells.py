"""One attack of an evaluation."""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn

from divqat._util.files import read_json, write_json
from divqat.attacks import Attack, KnownDecoy
from divqat.data import ImageSet
from divqat.evaluate.defended import Defended
from divqat.metrics import accuracy, fidelity, predict

CURVE_IMAGES = 2000  # test images that every epoch's clone is measured on


class Curve:
    """Records the test accuracy of a clone after every epoch; ``file`` keeps the values of an
    interrupted attack."""

    def __init__(self, file: Path, test: ImageSet) -> None:
        self.file, self.test = file, test.subset(slice(CURVE_IMAGES))
        stored = read_json(file, (dict, list)) if file.is_file() else []
        self.values: list[float] = stored["values"] if isinstance(stored, dict) else stored

    def __call__(self, clone: nn.Module, count: int) -> None:
        value = accuracy(predict(clone, self.test), self.test.labels)
        self.values[count - 1 :] = [value]
        write_json(self.file, {"values": self.values})


def run_attack(
    attack: Attack, defended: Defended, clone: nn.Module, holdout: ImageSet, work: Path
) -> dict[str, Any]:
    """Run an attack and measure its clone: the measured fields of
    :class:`divqat.evaluate.results.Cell`.

    Args:
        attack: one with a method ``against`` gets to know the defense, and
            :class:`divqat.attacks.KnownDecoy` the decoy.
        defended: the victim.
        clone: the surrogate, with its initial weights.
        holdout: the attacker's labeled images.
        work: the folder for the checkpoints.
    """
    deployed = defended.deployed
    test = deployed.test
    if defended.defense is not None and defended.defense.remembers:
        # The stored answers are of no use: this copy of the defense has forgotten those queries.
        shutil.rmtree(work, ignore_errors=True)
    if hasattr(attack, "against"):
        attack = attack.against(copy.deepcopy(defended.defense))
    if isinstance(attack, KnownDecoy):
        attack = attack.knowing(deployed.subject.decoy)
    curve = Curve(work / "curve.json", test)
    victim = defended.victim(attack.query_budget)
    start = time.perf_counter()
    extraction = attack(victim, deployed.queries, clone, resume_dir=work, watch=curve)
    seconds = time.perf_counter() - start
    answers = predict(extraction.clone, test)
    return {
        "accuracy": accuracy(answers, test.labels),
        "fidelity": fidelity(answers, defended.test_answers),
        "holdout_accuracy": accuracy(predict(extraction.clone, holdout), holdout.labels),
        "curve": curve.values,
        "queries": extraction.queries,
        "seconds": seconds,
    }
