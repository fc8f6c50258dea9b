"""A budget of validation accuracy, and how much of a defense it allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from divqat.data import LabeledImages
from divqat.evaluate import accuracy, predict
from divqat.train.config import SHARED, TrainConfig
from divqat.train.folder import Run, fingerprint, load_run

STEPS = 40  # on the whole way
QUANTIZATION = ("preset", "weight_bits", "activation_bits")


class Budget:
    """How far the weights go from undefended ones to defended ones.

        θ(s) = θ₁ + (2s − 1) (θ − θ₁),  s = 1, 0.975 ... 0.5
        θ(s) = θ₀ + 2s (θ₁ − θ₀),       s = 0.5, 0.475 ... 0

    After its last epoch a training has the weights θ. If they are outside the budget it is mended:
    a fifth as many epochs without the defense, at a twentieth of the learning rate, lead to θ₁. θ₀
    are the weights of plain QAT, or without a ``reference`` those of the teacher, where both began.
    The result is the first θ(s) inside the budget, A_ref − A(s) <= b in points of validation
    accuracy, or if there is none, the most accurate. Activation ranges and BatchNorm's statistics
    go the same way, whole numbers stay.

    A weight of the loss that is steered while training has to be judged at a high learning rate, at
    which accuracy is not yet what it will be, and each choice costs epochs. On the way back each
    costs a pass over the validation images. Its first half loses little by little of what the
    defense has taught, and accuracy rises; on its second half accuracy is lowest in the middle, and
    little of the defense is left when it is back, but it ends where the budget counts from. That
    networks trained on from the same weights can be joined by a straight line without such a
    barrier, and that what was learned second can be traded against the first on it, is of Frankle
    et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, arXiv
    1912.05671, and Ilharco et al., "Patching open-vocabulary models by interpolating weights",
    NeurIPS 2022, arXiv 2208.05592.

    The validation split no longer estimates without bias what it has chosen; the test split does.

    Args:
        points: b, above 0.
        reference: A_ref, a fraction.
        start: θ₀, a state dict; where it lacks something the trained value stays.

    Attributes:
        path: what was measured: share s, validation accuracy, points below the reference, and
            whatever else; the last row is the result.
    """

    def __init__(self, points: float, reference: float, start: Mapping[str, Any]) -> None:
        self.points, self.reference, self.start = points, reference, start
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
        return cls(config.accuracy_budget, found, reference.model.state_dict())

    def settle(
        self,
        model: nn.Module,
        measure: Callable[[], dict[str, float]],
        mend: Callable[[], None],
    ) -> None:
        """Give ``model``, which is trained, the weights that are the result.

        Args:
            measure: what is to be known of the model as it is: ``validation_accuracy``, a
                fraction, and what else is to be in the path.
            mend: trains the model on; not called where it is inside the budget as it is.
        """
        end = copied(model)
        if self._inside(1.0, measure()):
            return
        mend()
        mended = copied(model)

        def go(share: float) -> None:
            legs = (mended, end, 2 * share - 1), (self.start, mended, 2 * share)
            model.load_state_dict(between(*legs[share < 0.5]))

        for step in range(STEPS - 1, -1, -1):
            go(step / STEPS)
            if self._inside(step / STEPS, measure()):
                return
        self.path.append(min(self.path, key=lambda row: row["points_below"]))
        go(self.chosen["share"])

    def _inside(self, share: float, found: dict[str, float]) -> bool:
        """Add to the path what was found there."""
        below = 100 * (self.reference - found["validation_accuracy"])
        self.path.append({"share": share, "points_below": below, **found})
        return _within(below, self.points)

    @property
    def chosen(self) -> dict[str, float]:
        """The row of the path that is the result."""
        return self.path[-1]

    def summary(self) -> dict[str, Any]:
        """What to tell at the end."""
        found = {name: self.chosen[name] for name in ("share", "points_below")}
        inside = _within(self.chosen["points_below"], self.points)
        told = {"points": self.points, "reference": self.reference, **found, "inside": inside}
        return {**told, "path": self.path}

    def line(self) -> str:
        """A line for the log."""
        row = self.chosen
        return (
            f"accuracy budget: {row['share']:.0%} of the way from the reference's "
            f"{self.reference:.2%}: {row['validation_accuracy']:.2%}, {row['points_below']:.2f} "
            f"points below, {self.points:g} allowed"
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
                "is left of the defense: try more epochs, a smaller lr, weight or misdirect, or a "
                "larger budget"
            )
        return None

    def state(self) -> dict[str, Any]:
        """What a training that goes on has to find again."""
        return {"path": self.path, "start": fingerprint(self.start)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`.

        Raises:
            ValueError: it began with another reference.
        """
        if state["start"] != fingerprint(self.start):
            raise ValueError("reference: it has changed since this training was begun")
        self.path = state["path"]


def between(start: Mapping[str, Any], end: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The state dict after a share, from 0 to 1, of the straight way; only floating-point tensors
    move, and with share 0 and 1 the bits are those of ``start`` and ``end``."""

    def move(name: str, last: Any) -> Any:
        first = start.get(name, last)
        if not isinstance(last, Tensor) or not last.is_floating_point():
            return last
        first = first.to(last.device)
        # a range that was never observed is infinite, at both ends
        return torch.where(first == last, last, torch.lerp(first, last, share))

    return {name: move(name, last) for name, last in end.items()}


def load_reference(config: TrainConfig, teacher: Run | None) -> Run | None:
    """The plain QAT that a budget counts from; where ``config.reference`` is None the teacher.

    Raises:
        FileNotFoundError: no finished training in the folder ``config.reference``.
        ValueError: that is no plain QAT of the same teacher, data and quantized model.
    """
    if config.reference is None or teacher is None:
        return teacher
    run = load_run(str(config.reference))
    same = [name for name in (*SHARED, *QUANTIZATION) if name != "data_root"]
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


def copied(model: nn.Module) -> dict[str, Any]:
    """A state dict that stays as it is while the model changes."""
    state = model.state_dict().items()
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state}
