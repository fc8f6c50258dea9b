"""A budget of validation accuracy, and the defense's strength steered so that it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from divqat.data import LabeledImages
from divqat.evaluate import accuracy, predict
from divqat.train.config import SHARED, TrainConfig
from divqat.train.folder import Run, load_run, read_checkpoint

AIM = 0.5  # of the budget: measurements are noisy, and the test split is not the one measured
RATE = 0.5  # of the ascent: one check multiplies the factor by e^0.5 at most
LARGEST = 2.0  # excess that counts, in budgets; a first epoch may lose twenty times as much
FLOOR = 0.01  # from here to 1 it takes ten checks at least
# Where it begins: at 1, with a high learning rate, a network can be lost before the first check,
# and a factor that falls afterwards does not bring it back.
START = 0.1
# Steered after this part of the training: before, a high learning rate costs more than the defense.
BEGIN = 0.5


class Budget:
    """A factor in (0, 1] of λ and of the misdirection's weight, together.

    The problem is: protect most, subject to A_ref − A <= b, with A the accuracy on the validation
    split and A_ref that of the reference, in points. Its Lagrangian is
    −protection + μ · (A_ref − A − b), and f = 1 / μ is what scales the protection against the task.
    Ascent on log μ, after every measurement in the second half of the training:

        log f ← clip(log f − η · clip((A_ref(t) − A − ½ b) / b, −1, 2), log 0.01, 0)

    A_ref(t) is what plain QAT had at the same part of its training, at most what it ended with: at
    a high learning rate it, too, is worse than its teacher, and that is not the defense's cost. In
    the first half f stays at 0.1.

    (Platt and Barr, "Constrained differential optimization", NIPS 1987, there ascent on μ, by
    gradients of a constraint that has some; accuracy has none, and in the logarithm one η is right
    for all scales of λ.) After the last epoch the result is that epoch's model if it is inside the
    budget, else, of the epochs that ended inside, the one with the strongest defense: most
    proxies misled, or without misdirection most divergence.

    A whole validation split is measured ``budget_checks`` times per epoch of that half, the last
    time where it is anyway. What it has chosen, it no longer estimates without bias; the test split
    does.

    Args:
        points: b, above 0.
        course: the accuracy, a fraction, of the reference after each of its epochs; the last is
            A_ref.
        epochs: of this training. checks: measurements in each.
    """

    def __init__(self, points: float, course: Sequence[float], epochs: int, checks: int) -> None:
        self.points, self.course = points, tuple(course)
        self.epochs, self.checks = epochs, checks
        self.factor = START
        self.epoch = 0  # whose model is the result, as far as is known
        self.kept: dict[str, Any] = {}  # of the strongest epoch inside: epoch, strength, model

    @classmethod
    def of(
        cls, config: TrainConfig, teacher: Run | None, validation: LabeledImages
    ) -> Budget | None:
        """The budget of a training, if it has one; without ``config.reference`` against the
        teacher's accuracy.

        Raises:
            FileNotFoundError: no finished training in the folder ``config.reference``.
            ValueError: that is no plain QAT of the same data and model.
        """
        if config.accuracy_budget is None:
            return None
        if config.reference is not None:
            course = reference_course(config)
        else:
            assert teacher is not None
            course = [accuracy(predict(teacher.model, validation), validation.labels)]
        return cls(config.accuracy_budget, course, config.epochs, config.budget_checks)

    @property
    def reference(self) -> float:
        """A_ref."""
        return self.course[-1]

    def expected(self, epoch: float) -> float:
        """A_ref(t) after so many epochs of this training, not a whole number within one."""
        place = max(0.0, epoch / self.epochs * len(self.course) - 1)
        before = min(int(place), len(self.course) - 1)
        after = min(before + 1, len(self.course) - 1)
        found = self.course[before] + (place - before) * (self.course[after] - self.course[before])
        return min(found, self.reference)

    def below(self, accuracy: float) -> float:
        """How many points an accuracy is below the reference."""
        return 100 * (self.reference - accuracy)

    def inside(self, accuracy: float) -> bool:
        return self.below(accuracy) <= self.points + 1e-9  # rounding of the difference

    def begun(self, epoch: float) -> bool:
        """Whether it is steered after so many epochs."""
        return epoch > BEGIN * self.epochs

    def due(self, epoch: int, step: int, steps: int) -> bool:
        """Whether to measure after this step, from 1, of an epoch, from 1, of so many. Not after
        the last: the epoch ends with a measurement."""
        if step == steps or not self.begun(epoch - 1 + step / steps):
            return False
        return step * self.checks // steps > (step - 1) * self.checks // steps

    def steer(self, accuracy: float, epoch: float) -> float:
        """The factor from now on; ``epoch`` as in :meth:`expected`."""
        below = 100 * (self.expected(epoch) - accuracy)
        excess = (below - AIM * self.points) / self.points
        move = -RATE * min(LARGEST, max(-1.0, excess))
        self.factor = min(1.0, max(FLOOR, self.factor * math.exp(move)))
        return self.factor

    def end_epoch(self, row: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Take note of an epoch's model, and steer.

        Args:
            row: of ``metrics.csv``. model: which has been measured.

        Returns:
            Columns for the row: the factor of the last steps, and points below the reference.
        """
        found, used = row["validation_accuracy"], self.factor
        self.epoch = row["epoch"]
        strength = row.get("misled", row["divergence"])
        if self.inside(found) and strength >= self.kept.get("strength", -math.inf):
            state = {
                name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for name, value in model.state_dict().items()
            }
            self.kept = {"epoch": self.epoch, "strength": strength, "model": state}
        if self.begun(self.epoch):
            self.steer(found, self.epoch)
        return {"factor": used, "points_below": self.below(found)}

    def choose(self, row: dict[str, Any], model: nn.Module) -> None:
        """Make ``model``, after the last epoch, the result; ``row`` is that epoch's."""
        if not self.inside(row["validation_accuracy"]) and self.kept:
            self.epoch = self.kept["epoch"]
            model.load_state_dict(self.kept["model"])

    def summary(self, row: dict[str, Any]) -> dict[str, Any]:
        """What to tell at the end; ``row`` is that of the epoch chosen."""
        return {
            "points": self.points,
            "reference": self.reference,
            "epoch": self.epoch,
            "factor": row["factor"],
            "points_below": row["points_below"],
            "inside": self.inside(row["validation_accuracy"]),
        }

    def warning(self, row: dict[str, Any]) -> str | None:
        """A sentence if no epoch ended inside the budget."""
        if self.inside(row["validation_accuracy"]):
            return None
        return (
            f"accuracy_budget: wanted at most {self.points:g} points below "
            f"{self.reference:.2%}, got {row['points_below']:.2f}, and no epoch ended inside, with "
            f"a factor of {row['factor']:.3f} in the end: try more epochs, a smaller lr, weight or "
            "misdirect, or a larger budget"
        )

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on; the reference, too, as a run goes on with the one
        it began with."""
        names = ("course", "factor", "epoch", "kept")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def reference_course(config: TrainConfig) -> list[float]:
    """The validation accuracies of the plain QAT in the folder ``config.reference``; see
    :meth:`Budget.of`."""
    run = load_run(str(config.reference))
    same = [name for name in SHARED if name != "data_root"]
    wanted = {"method": "qat"} | {name: getattr(config, name) for name in same}
    for name, value in wanted.items():
        if getattr(run.config, name) != value:
            raise ValueError(
                f"reference: wanted a training with {name} = {value}, got "
                f"{getattr(run.config, name)} in {config.reference}"
            )
    return [row["validation_accuracy"] for row in read_checkpoint(run.folder)["rows"]]
