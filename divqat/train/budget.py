"""A budget of validation accuracy, and how much of a defense it allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.devices import fingerprint
from divqat.data import LabeledImages
from divqat.metrics import accuracy, predict
from divqat.train.config import QUANTIZATION, SHARED, TrainConfig
from divqat.train.folder import Run, load_run
from divqat.train.network import build_model

STEPS = 20  # on the whole way
REWINDS = 2  # with half of λ and w, and with a quarter


class Budget:
    """How strong a defense may be, and how far the weights go from undefended to defended ones.

    Inside is A_ref − A <= b in points of validation accuracy. The result is the last network that
    is inside, of those after each of the last third of the epochs. If none is, the training goes
    back to before these, and on from there with half the weights λ and w in the loss; if need be a
    second time, with a quarter. Weights of the loss that change while training would have to be
    judged at a high learning rate, at which accuracy is not yet what it will be; here each is
    judged by the networks that it leads to, for a third of the time. (To rewind weights and
    learning rate, there to train on after pruning: Renda, Frankle and Carbin, "Comparing rewinding
    and fine-tuning in neural network pruning", ICLR 2020, arXiv 2003.02389, §2.)

    What is outside then, too, goes towards the reference:

        θ(s) = θ₀ + s (θ − θ₀),  s = 1, 0.95 ... 0

    θ are the last weights, θ₀ those of plain QAT, or without a ``reference`` those of the teacher,
    where both began. The result is the first θ(s) inside, or if there is none, the most accurate.
    Activation ranges and BatchNorm's statistics go the same way, and a zero point that is no longer
    its range's follows, with the scale; other whole numbers stay. Where accuracy is lowest in the
    middle of the way, little of the defense is left when it is back. That networks trained on from
    the same weights can be joined by a straight line without such a barrier, and that what was
    learned second can be traded against the first on it, is of Frankle et al., "Linear mode
    connectivity and the lottery ticket hypothesis", ICML 2020, arXiv 1912.05671, and Ilharco et
    al., "Patching open-vocabulary models by interpolating weights", NeurIPS 2022, arXiv 2208.05592.

    The validation split no longer estimates without bias what it has chosen; the test split does.

    Args:
        points: b, above 0.
        reference: A_ref, a fraction.
        start: θ₀, a state dict; where it lacks something the trained value stays.

    Attributes:
        attempts: networks that were outside and were given up: validation accuracy, points below
            the reference and whatever else was measured, the share of λ and w in their last epochs,
            and the seconds of these.
        path: what was measured of the last one: share s, validation accuracy, points below the
            reference, and whatever else; the last row is the result.
    """

    def __init__(self, points: float, reference: float, start: Mapping[str, Any]) -> None:
        self.points, self.reference, self.start = points, reference, start
        self.attempts: list[dict[str, float]] = []
        self.path: list[dict[str, float]] = []

    @classmethod
    def of(
        cls, config: TrainConfig, reference: Run | None, validation: LabeledImages
    ) -> Budget | None:
        """The budget of a training, if it has one; ``reference`` of :func:`load_reference`."""
        if config.accuracy_budget is None:
            return None
        assert reference is not None
        found = accuracy(predict(reference.model, validation), validation.labels)
        return cls(config.accuracy_budget, found, weights_of(config, reference))

    @property
    def weaker(self) -> float:
        """The share of λ and w that the defense has in the loss by now."""
        return 0.5 ** len(self.attempts)

    def allows(self, validation_accuracy: float) -> bool:
        """Whether a network of this accuracy, a fraction, is inside."""
        return _within(self._below({"validation_accuracy": validation_accuracy}), self.points)

    @property
    def patient(self) -> bool:
        """Whether the last third may be learned once more."""
        return len(self.attempts) < REWINDS

    def give_up(self, found: dict[str, float], seconds: float) -> None:
        """Note a network that is outside; the defense is weaker from now on.

        Args:
            found: as of ``measure`` in :meth:`settle`. seconds: what is lost with it.
        """
        given_up = {"weaker": self.weaker, "seconds": seconds, "points_below": self._below(found)}
        self.attempts.append(given_up | found)

    def settle(self, model: nn.Module, measure: Callable[[], dict[str, float]]) -> None:
        """Give ``model``, which is trained, the weights that are the result.

        Args:
            measure: what is to be known of the model as it is: ``validation_accuracy``, a
                fraction, and what else is to be in the path.
        """
        end = deepcopy(model.state_dict())
        for step in range(STEPS, -1, -1):
            share = step / STEPS
            model.load_state_dict(between(self.start, end, share))
            found = measure()
            below = self._below(found)
            self.path.append({"share": share, "points_below": below, **found})
            if _within(below, self.points):
                break
        else:
            self.path.append(min(self.path, key=lambda row: row["points_below"]))
            model.load_state_dict(between(self.start, end, self.chosen["share"]))

    def _below(self, found: dict[str, float]) -> float:
        return 100 * (self.reference - found["validation_accuracy"])

    @property
    def chosen(self) -> dict[str, float]:
        """The row of the path that is the result."""
        return self.path[-1]

    def summary(self) -> dict[str, Any]:
        """What to tell at the end."""
        found = {name: self.chosen[name] for name in ("share", "points_below")}
        inside = _within(self.chosen["points_below"], self.points)
        outcome = {"points": self.points, "reference": self.reference, **found, "inside": inside}
        return {**outcome, "weaker": self.weaker, "attempts": self.attempts, "path": self.path}

    def line(self) -> str:
        """A line for the log."""
        row = self.chosen
        return (
            f"accuracy budget: epoch {row['epoch']:g}, {row['share']:.0%} of the way from the "
            f"reference's {self.reference:.2%}: {row['validation_accuracy']:.2%}, "
            f"{row['points_below']:.2f} points below, {self.points:g} allowed"
        )

    def again(self, epoch: int) -> str:
        """A line for the log, after :meth:`give_up`; training goes on after ``epoch``."""
        last = self.attempts[-1]
        return (
            f"accuracy budget: {last['points_below']:.2f} points below the reference's "
            f"{self.reference:.2%}, {self.points:g} allowed: back to epoch {epoch}, and on with "
            f"{self.weaker:g} of the defense's weight"
        )

    def warning(self) -> str | None:
        """A sentence if the budget is not kept, or nothing is left of the defense."""
        row = self.chosen
        if not _within(row["points_below"], self.points):
            return (
                f"accuracy_budget: wanted at most {self.points:g} points below "
                f"{self.reference:.2%}, got {row['points_below']:.2f} at best, "
                f"{row['share']:.0%} of the way to the defended weights: name a reference, or try "
                "a larger budget"
            )
        if row["share"] == 0:
            return (
                f"accuracy_budget: inside {self.points:g} points of {self.reference:.2%} nothing "
                "is left of the defense: try lr_warmup_epochs, more epochs, a smaller lr, weight "
                "or misdirect, or a larger budget"
            )
        return None

    def state(self) -> dict[str, Any]:
        """What a training that goes on has to find again."""
        return {
            "attempts": self.attempts, "path": self.path, "start": fingerprint(self.start),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`.

        Raises:
            ValueError: it began with another reference.
        """
        if state["start"] != fingerprint(self.start):
            raise ValueError("reference: it has changed since this training was begun")
        self.attempts, self.path = state.get("attempts", []), state["path"]


def between(start: Mapping[str, Any], end: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The state dict after a share, from 0 to 1, of the straight way; only floating-point tensors
    move, and with share 0 and 1 the bits are those of ``start`` and ``end``. Scale and zero point
    follow from each range when it is loaded."""

    def move(name: str, last: Any) -> Any:
        first = start.get(name, last)
        if not isinstance(last, Tensor) or not last.is_floating_point():
            return last
        first = first.to(last.device)
        # a range that was never observed is infinite, at both ends
        return torch.where(first == last, last, torch.lerp(first, last, share))

    return {name: move(name, last) for name, last in end.items()}


def weights_of(config: TrainConfig, run: Run) -> dict[str, Any]:
    """The state dict of ``run`` in the names of the model that ``config`` trains: those of a
    folded BatchNorm differ. One of full precision has no activation ranges."""
    if run.config.kind.quantized:
        return run.model.state_dict()
    model = build_model(config, run.shape)
    model.load_state_dict(run.model.state_dict())
    state = model.state_dict()
    return {name: state[name] for name in state if "fake_quantize" not in name}


def load_reference(config: TrainConfig, teacher: Run | None) -> Run | None:
    """The plain QAT that a budget counts from; where ``config.reference`` is None the teacher.

    Raises:
        FileNotFoundError: no finished training in the folder ``config.reference``.
        ValueError: that is no plain QAT of the same teacher, data and quantized model.
    """
    if config.reference is None or teacher is None:
        return teacher
    run = load_run(str(config.reference))
    ignored = {"data_root", *config.idle}
    same = [name for name in (*SHARED, *QUANTIZATION) if name not in ignored]
    wanted = {"method": "qat"} | {name: getattr(config, name) for name in same}
    for name, value in wanted.items():
        if getattr(run.config, name) != value:
            raise ValueError(
                f"reference: wanted a training with {name} = {value}, got "
                f"{getattr(run.config, name)} in {config.reference}"
            )
    if run.teacher != teacher.fingerprint:
        raise ValueError(
            f"reference: wanted a training from the teacher {config.teacher}, got one from "
            f"another in {config.reference}"
        )
    return run


def _within(below: float, points: float) -> bool:
    return below <= points + 1e-9  # rounding of the difference
