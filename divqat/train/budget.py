"""The accuracy budget: how much of the defense a loss of validation accuracy allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.devices import fingerprint
from divqat.data import LabeledImages
from divqat.metrics import accuracy, predict
from divqat.quantize.rectify import output_bias, output_quantizer
from divqat.train.config import QUANTIZATION, SHARED, TrainConfig
from divqat.train.folder import Run, load_run
from divqat.train.network import build_model

STEPS = 20  # of the interpolation
REWINDS = 2  # with half of λ and w, then with a quarter


class Budget:
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

    A network that rejects foreign images (``misdirect_target`` reject) has a threshold besides,
    below which its largest logit counts as a rejection: the largest that the budget allows. Since
    accuracy falls with it, a loss of accuracy that is left is spent on rejecting more.

    The validation accuracy of the chosen network is biased, as it was chosen by it; the test
    accuracy is not.

    Args:
        points: b, above 0.
        reference: A_ref, a fraction.
        start: θ₀, a state dict; entries that it lacks keep their trained values.

    Attributes:
        threshold: what was subtracted from the logits of a network that rejects.
        attempts: one row per rejected network: its validation accuracy, points below the reference
            and other measurements, the share of λ and w in its last epochs (``weaker``), and how
            many seconds these epochs took.
        path: one row per interpolated network: share s, validation accuracy, points below the
            reference and other measurements. The last row is the result.
    """

    def __init__(self, points: float, reference: float, start: Mapping[str, Any]) -> None:
        self.points, self.reference, self.start = points, reference, start
        self.attempts: list[dict[str, float]] = []
        self.path: list[dict[str, float]] = []
        self.threshold = 0.0

    @classmethod
    def from_config(
        cls, config: TrainConfig, reference: Run | None, validation: LabeledImages
    ) -> Budget | None:
        """The budget of a training, or None; ``reference`` is from :func:`load_reference`."""
        if config.accuracy_budget is None:
            return None
        assert reference is not None
        reference_accuracy = accuracy(predict(reference.model, validation), validation.labels)
        return cls(config.accuracy_budget, reference_accuracy, reference_weights(config, reference))

    @property
    def strength(self) -> float:
        """The current share of λ and w: 1, 0.5 or 0.25."""
        return 0.5 ** len(self.attempts)

    def allows(self, validation_accuracy: float) -> bool:
        """Whether a network of this accuracy, a fraction, is within the budget."""
        measured = {"validation_accuracy": validation_accuracy}
        return _within(self._points_below(measured), self.points)

    def largest_threshold(
        self,
        logits: Tensor,  # [N, num_classes], not rectified
        labels: Tensor,  # int64 [N]
    ) -> float | None:
        """The largest t such that answers max(logits - t, 0) are within the budget if zeros count
        as wrong; None: no t is."""
        least = math.ceil((self.reference - self.points / 100) * len(labels) - 1e-6)
        top, answer = logits.max(1)
        right = top[answer == labels].sort(descending=True).values
        if len(right) < least:
            return None
        return float(right[max(least, 1) - 1])

    @torch.no_grad()
    def spend_on_threshold(self, model: nn.Module, threshold: float | None) -> bool:
        """Subtract a :meth:`largest_threshold` from the logits of ``model``, in the bias of its
        last layer; False: there is no threshold or no such bias."""
        bias, quantizer = output_bias(model), output_quantizer(model)
        if threshold is None or bias is None or quantizer is None:
            return False
        scale, _ = quantizer.calculate_qparams()
        threshold -= float(scale)  # what is left of the logit at the threshold is above 0
        bias -= threshold
        self.threshold += threshold
        return True

    @property
    def can_rewind(self) -> bool:
        """Whether the last third of the epochs may be repeated once more."""
        return len(self.attempts) < REWINDS

    def reject(self, measured: dict[str, float], seconds: float) -> None:
        """Record a network that exceeds the budget, and halve ``strength``.

        Args:
            measured: what ``measure`` returned, see :meth:`choose_weights`.
            seconds: how long the epochs took that are discarded with the network.
        """
        below = self._points_below(measured)
        attempt = {"weaker": self.strength, "seconds": seconds, "points_below": below}
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
            if _within(below, self.points):
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
        """The entry ``budget`` of ``summary.json``."""
        chosen = {name: self.chosen[name] for name in ("share", "points_below")}
        inside = _within(self.chosen["points_below"], self.points)
        outcome = {"points": self.points, "reference": self.reference, **chosen, "inside": inside}
        outcome["threshold"] = self.threshold
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
        """What a checkpoint stores, to resume from."""
        return {
            "attempts": self.attempts, "path": self.path, "start": fingerprint(self.start),
            "threshold": self.threshold,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state`.

        Raises:
            ValueError: the state belongs to another reference.
        """
        if state["start"] != fingerprint(self.start):
            raise ValueError("reference: it has changed since this training started")
        self.attempts, self.path = state.get("attempts", []), state["path"]
        self.threshold = state.get("threshold", 0.0)


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


def reference_weights(config: TrainConfig, run: Run) -> dict[str, Any]:
    """The state dict of ``run`` with the parameter names of the model that ``config`` trains, where
    BatchNorms are folded into convolutions. From a full-precision run it has no ranges."""
    if run.config.kind.quantized:
        return run.model.state_dict()
    model = build_model(config, run.shape)
    model.load_state_dict(run.model.state_dict())
    state = model.state_dict()
    return {name: state[name] for name in state if "fake_quantize" not in name}


def load_reference(config: TrainConfig, teacher: Run | None) -> Run | None:
    """The plain QAT run that the budget is measured against, or the teacher if
    ``config.reference`` is None.

    Raises:
        FileNotFoundError: no training in the folder ``config.reference``.
        ValueError: it is unfinished, or not plain QAT with the same teacher, data and quantization.
    """
    if config.reference is None or teacher is None:
        return teacher
    run = load_run(str(config.reference))
    ignored = {"data_root", *config.unused}
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
    return below <= points + 1e-9  # the difference is rounded
