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
    """Watches a clone's test accuracy; what an interrupted attack has seen is kept in ``file``."""

    def __init__(self, file: Path, test: ImageSet) -> None:
        self.file, self.test = file, test.subset(slice(CURVE_IMAGES))
        found = read_json(file, (dict, list)) if file.is_file() else []
        self.values: list[float] = found["values"] if isinstance(found, dict) else found

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
        attack: an attack that wants to know the defense (it has ``against``) is told,
            and so is one that wants to know the decoy.
        defended: the victim.
        clone: with its first weights.
        holdout: the attacker's labeled images.
        work: keeps the checkpoints.
    """
    deployed = defended.deployed
    test = deployed.test
    if defended.defense is not None and defended.defense.remembers:
        shutil.rmtree(work, ignore_errors=True)  # half of the answers, and a defense of none
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
