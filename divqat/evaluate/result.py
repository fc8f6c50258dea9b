"""What a whole job found out: the schema of ``OUT/result.json``.

The file is ``Result.to_dict()`` and its checksum: the fields of :class:`Result`, with one object
per seed and victim in ``victims``. Shares (accuracy, fidelity, agreement) are fractions in [0, 1];
what was not measured is null; there is no NaN. "Deployed" is the exported int8 model where there is
one.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divqat.evaluate.metrics import entropy, mean_top_probability, top_probability_histogram
from divqat.evaluate.rows import made
from divqat.files import read_json, write_json

SOFT, HARD = "probs", "label"  # names of answers, see divqat.victim.Victim.answer


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How sure the deployed victim is of its answers on one set of images."""

    top_probability: float  # mean
    entropy: float  # mean, nats
    histogram: list[int]  # images per 20th of [0, 1] that the top probability lies in

    @classmethod
    def of(cls, probs: Tensor) -> Confidence:
        """From probabilities [N, num_classes]."""
        return cls(
            top_probability=mean_top_probability(probs),
            entropy=entropy(probs),
            histogram=top_probability_histogram(probs),
        )


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """A clone, measured on the test set."""

    accuracy: float
    fidelity: float  # same top-1 as the deployed victim
    queries: int


@dataclass(frozen=True, kw_only=True)
class VictimResult:
    """One victim of one seed; accuracies are those on the test set unless said otherwise."""

    seed: int
    name: str  # of the run folder: qat, divqat ...
    method: str  # ptq, qat, nasty-qat, divqat ...; "qat" is the undefended control
    settings: dict[str, Any]  # what the method was told: weight, temperature ...
    accuracy_fp: float  # of the full-precision model that this victim was made from
    accuracy_fake: float | None = None  # of the fake-quantized model
    accuracy_onnx: float | None = None  # of the exported int8 model
    validation_accuracy: float | None = None
    argmax_agreement: float | None = None  # of the fake-quantized and the exported model
    int8_layers: int | None = None
    float_layers: int | None = None
    test: Confidence | None = None
    transfer: Confidence | None = None  # on the query set
    deterministic: bool | None = None  # the same images answered twice alike
    distributions: bool | None = None  # answers are non-negative and sum to 1
    attacks: dict[str, AttackResult] = field(default_factory=dict)  # by Victim.answer

    @property
    def accuracy(self) -> float:
        """Test accuracy of what is deployed: int8 before fake-quantized before full precision."""
        known = (self.accuracy_onnx, self.accuracy_fake, self.accuracy_fp)
        return next(value for value in known if value is not None)

    @property
    def best(self) -> float | None:
        """Accuracy of the best clone, whatever the answers were; None without an attack."""
        return max((attack.accuracy for attack in self.attacks.values()), default=None)

    def clone(self, answer: str, what: str = "accuracy") -> float | None:
        """A field of the attack with this answer; None when it was not run."""
        return getattr(self.attacks[answer], what) if answer in self.attacks else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of ``result.json``."""

    dataset: str
    num_classes: int
    chance: float  # test accuracy of always naming the most frequent class
    query_set: str
    query_budget: int  # queries that each attack may make
    attack: str  # KnockoffNets ...
    attack_settings: dict[str, Any]
    clone: str  # architecture
    seeds: list[int]  # planned; a seed without victims has not been run yet
    command: str
    date: str  # ISO 8601
    seconds: float
    versions: dict[str, str]
    hardware: str
    victims: list[VictimResult]

    @property
    def by_victim(self) -> dict[str, list[VictimResult]]:
        """The victims by name, in the order of their first appearance."""
        groups: dict[str, list[VictimResult]] = {}
        for victim in self.victims:
            groups.setdefault(victim.name, []).append(victim)
        return groups

    @property
    def control(self) -> list[VictimResult]:
        """Plain QAT, one per seed: the first victim of method ``qat``; [] when there is none."""
        return next((runs for runs in self.by_victim.values() if runs[0].method == "qat"), [])

    @property
    def floor(self) -> list[float]:
        """Accuracies of hard-label clones of plain QAT: what hiding the probabilities leaves."""
        return [v.attacks[HARD].accuracy for v in self.control if HARD in v.attacks]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            return made(cls, {**data, "victims": [_victim(victim) for victim in data["victims"]]})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a divqat result: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write ``result.json`` atomically; NaN and Inf are refused."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read ``result.json``.

        Raises:
            FileNotFoundError, ValueError: it is missing or is no result.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no result at {path}; `divqat run` writes it")
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _victim(data: dict[str, Any]) -> VictimResult:
    nested: dict[str, Any] = {
        key: made(Confidence, data[key])
        for key in ("test", "transfer")
        if data.get(key) is not None
    }
    attacks = {name: made(AttackResult, a) for name, a in data.get("attacks", {}).items()}
    return made(VictimResult, {**data, **nested, "attacks": attacks})


def versions() -> dict[str, str]:
    """Versions of Python, divqat and the packages that numbers depend on, where installed."""
    from divqat import __version__

    found = {"python": platform.python_version(), "divqat": __version__}
    for name in ("torch", "triton", "numpy", "onnx", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Processor, threads used by torch, and GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, f":{cpu}").partition(":")[2].strip()
    parts = [cpu, f"{torch.get_num_threads()} of {os.cpu_count()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)
