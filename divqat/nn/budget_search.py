"""The search for the strongest defense within an accuracy budget, for every training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20  # of the interpolation
REWINDS = 2  # with half of λ and w, then with a quarter


class BudgetSearch:
    """Weakens the defense until the network is within the accuracy budget.

    A network is within the budget if A_ref − A <= b, in points of validation accuracy. The result
    is the last one within it, among the networks after each of the last third of the epochs. If
    there is none, the training rewinds to before these epochs and repeats them with half the loss
    weights λ and w; if necessary a second time, with a quarter. To adjust the loss weights during
    training instead, one would have to judge them at a high learning rate, where accuracy is still
    far from its final value. Here each choice is judged by the networks that it leads to, at the
    cost of a third of the training. (Rewinding weights and learning rate was proposed for
    retraining after pruning: Renda, Frankle and Carbin, "Comparing rewinding and fine-tuning in
    neural network pruning", ICLR 2020, arXiv 2003.02389, §2.)

    If the last attempt exceeds the budget, too, its weights are interpolated towards the reference:

        θ(s) = θ₀ + s (θ − θ₀),  s = 1, 0.95 ... 0

    θ are the last weights, θ₀ those of plain QAT, or without a ``reference`` those of the teacher,
    from which both started. The result is the first θ(s) within the budget, or else the most
    accurate one. Activation ranges and BatchNorm statistics are interpolated as well; scales and
    zero points follow from the ranges, and other integers stay. If accuracy is lowest in the middle
    of the path, little of the defense is left once it has recovered. That networks fine-tuned from
    the same weights can be connected by a straight line without such a barrier is a finding of
    Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, arXiv
    1912.05671; that the line trades the second task against the first, of Ilharco et al., "Patching
    open-vocabulary models by interpolating weights", NeurIPS 2022, arXiv 2208.05592.

    The validation accuracy of the chosen network is biased, as it was chosen by it; the test
    accuracy is not.

    Args:
        points: b, above 0.
        reference: A_ref, a fraction.
        start: θ₀, a state dict; entries that it lacks keep their trained values.
        rewinds: how often the last third may be repeated.

    Attributes:
        kept: before the last third None, then the loop's state before it, to rewind to, and
            ``inside``, the last network within the budget.
        attempts: one row per rejected network: its validation accuracy, points below the reference
            and other measurements, and the share of λ and w in its last epochs (``weaker``).
        path: one row per interpolated network: share s, validation accuracy, points below the
            reference and other measurements. The last row is the result.
    """

    # What to try if the budget is exceeded, and if nothing is left of the defense.
    remedies = (
        "pass start=, the weights of plain QAT, or try a larger budget",
        "try a warm-up of the learning rate, more epochs, a smaller learning rate or weight, or a "
        "larger budget",
    )

    def __init__(
        self, points: float, reference: float, start: Mapping[str, Any], rewinds: int = REWINDS
    ) -> None:
        self.points, self.reference, self.start = points, reference, start
        self.rewinds = rewinds
        self.kept: dict[str, Any] | None = None
        self.attempts: list[dict[str, float]] = []
        self.path: list[dict[str, float]] = []

    @property
    def strength(self) -> float:
        """The current share of λ and w: 1, 0.5 or 0.25."""
        return 0.5 ** len(self.attempts)

    def is_within(self, points_below: float) -> bool:
        """Whether a network so far below the reference is within the budget."""
        return within(points_below, self.points)

    def allows(self, validation_accuracy: float) -> bool:
        """Whether a network of this accuracy, a fraction, is within the budget."""
        return self.is_within(self._points_below({"validation_accuracy": validation_accuracy}))

    @property
    def can_rewind(self) -> bool:
        """Whether the last third of the epochs may be repeated once more."""
        return len(self.attempts) < self.rewinds

    def begin(self, state: Mapping[str, Any]) -> None:
        """Copy the loop's state before the last third: ``epoch``, the number of epochs done, the
        state dict ``model``, and what else the loop restores."""
        self.kept = deepcopy({**state, "inside": None})

    def keep(self, model: nn.Module, epoch: int) -> None:
        """Copy a network within the budget, as it is after ``epoch``."""
        assert self.kept is not None
        self.kept["inside"] = deepcopy({"epoch": epoch, "model": model.state_dict()})

    def end(
        self,
        model: nn.Module,
        epoch: int,
        measure: Callable[[int], dict[str, float]],
        *,
        seconds: float | None = None,
    ) -> dict[str, Any] | None:
        """Decide after the last ``epoch``.

        Args:
            measure: evaluates ``model`` as it is, for a row that names the given epoch; see
                :meth:`choose_weights`.
            seconds: how long the epochs since :meth:`begin` took.

        Returns:
            The state to rewind to, and half the ``strength``, or None: ``model`` is the result.
        """
        inside = None if self.kept is None else self.kept["inside"]
        if inside is None and self.kept is not None and self.can_rewind:
            self.reject(measure(epoch), seconds)
            return deepcopy(self.kept)
        if inside is not None:
            model.load_state_dict(inside["model"])
        chosen = epoch if inside is None else inside["epoch"]
        self.choose_weights(model, partial(measure, chosen))
        self.kept = None
        return None

    def reject(self, measured: dict[str, float], seconds: float | None = None) -> None:
        """Record a network that exceeds the budget, and halve ``strength``.

        Args:
            measured: what ``measure`` returned, see :meth:`choose_weights`.
            seconds: how long the epochs took that are discarded with the network.
        """
        attempt = {"weaker": self.strength, "points_below": self._points_below(measured)}
        if seconds is not None:
            attempt["seconds"] = seconds
        self.attempts.append(attempt | measured)

    def choose_weights(self, model: nn.Module, measure: Callable[[], dict[str, float]]) -> None:
        """Interpolate the weights of the trained ``model`` until it is within the budget.

        Args:
            measure: evaluates ``model`` as it is; returns ``validation_accuracy``, a fraction, and
                whatever else ``path`` should record.
        """
        end = deepcopy(model.state_dict())
        for step in range(STEPS, -1, -1):
            share = step / STEPS
            model.load_state_dict(interpolate(self.start, end, share))
            measured = measure()
            below = self._points_below(measured)
            self.path.append({"share": share, "points_below": below, **measured})
            if self.is_within(below):
                break
        else:
            self.path.append(min(self.path, key=lambda row: row["points_below"]))
            model.load_state_dict(interpolate(self.start, end, self.chosen["share"]))

    def _points_below(self, measured: dict[str, float]) -> float:
        return 100 * (self.reference - measured["validation_accuracy"])

    @property
    def chosen(self) -> dict[str, float]:
        """The row of ``path`` that describes the result."""
        return self.path[-1]

    def summary(self) -> dict[str, Any]:
        """The result and how it came about, as plain data."""
        chosen = {name: self.chosen[name] for name in ("share", "points_below")}
        inside = self.is_within(self.chosen["points_below"])
        outcome = {"points": self.points, "reference": self.reference, **chosen, "inside": inside}
        return {**outcome, "weaker": self.strength, "attempts": self.attempts, "path": self.path}

    def message(self) -> str:
        """The result as a log line."""
        row = self.chosen
        return (
            f"accuracy budget: epoch {row['epoch']:g}, {row['share']:.0%} of the way from the "
            f"reference's {self.reference:.2%}: {row['validation_accuracy']:.2%}, "
            f"{row['points_below']:.2f} points below, {self.points:g} allowed"
        )

    def rewind_message(self, epoch: int) -> str:
        """The log line after :meth:`reject`, when training resumes after ``epoch``."""
        last = self.attempts[-1]
        return (
            f"accuracy budget: {last['points_below']:.2f} points below the reference's "
            f"{self.reference:.2%}, {self.points:g} allowed: going back to epoch {epoch}, with "
            f"{self.strength:g} of the defense's weight"
        )

    def warning(self) -> str | None:
        """A warning if the budget is exceeded or nothing is left of the defense, else None."""
        row = self.chosen
        if not self.is_within(row["points_below"]):
            return (
                f"accuracy_budget: wanted at most {self.points:g} points below "
                f"{self.reference:.2%}, got {row['points_below']:.2f} at best, "
                f"{row['share']:.0%} of the way to the defended weights: {self.remedies[0]}"
            )
        if row["share"] == 0:
            return (
                f"accuracy_budget: inside {self.points:g} points of {self.reference:.2%} nothing "
                f"is left of the defense: {self.remedies[1]}"
            )
        return None


def within(points_below: float, points: float) -> bool:
    """Whether a loss of accuracy is within a budget, both in points."""
    return points_below <= points + 1e-5  # accuracies are rounded, some loops' to float32


def last_third(epochs: int) -> int:
    """The epoch after which the last third of ``epochs`` begins; 0 is the start."""
    return epochs - max(1, round(epochs / 3))


def without_ranges(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a prepared model's state dict that come from the float model."""
    return {name: value for name, value in state.items() if "fake_quantize" not in name}


def interpolate(start: Mapping[str, Any], end: Mapping[str, Any], share: float) -> dict[str, Any]:
    """start + share · (end − start) for every floating-point tensor; other values are those of
    ``end``. Shares of 0 and 1 give the bits of ``start`` and ``end``. Scales and zero points follow
    from the ranges when the state dict is loaded."""

    def interpolated(name: str, last: Any) -> Any:
        first = start.get(name, last)
        if not isinstance(last, Tensor) or not last.is_floating_point():
            return last
        first = first.to(last.device)
        # where, as a range that was never observed is infinite in both
        return torch.where(first == last, last, torch.lerp(first, last, share))

    return {name: interpolated(name, last) for name, last in end.items()}
