"""The accuracy budget of ``divqat train`` for any training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from divqat._util.modes import modes_kept
from divqat.nn.budget_search import REWINDS, BudgetSearch, last_third, without_ranges
from divqat.nn.loss import DivQATLoss
from divqat.nn.misdirection import MisdirectionLoss

LEAST = 0.01  # points; a single image of 10,000
# What a state dict holds, of the search and of the budget itself.
SEARCH = ("reference", "points", "start", "attempts", "path", "kept")
OWN = ("epochs", "epoch", "finished", "weights")

Loss = MisdirectionLoss | DivQATLoss


class Stateful(Protocol):
    """An optimizer, a schedule, a GradScaler, a module ..."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class AccuracyBudget:
    """Limits the loss of validation accuracy by weakening the defense, as ``divqat train`` does.

    The loop calls :meth:`step` after every epoch, and runs until ``finished``:

        misdirection = MisdirectionLoss(loader, num_classes=10, seed=secret, weight=0.8)
        budget = AccuracyBudget(
            model, misdirection, validate, reference=0.93, points=0.5, epochs=10,
            start=plain_qat.state_dict(), restore=[optimizer, schedule],
        )
        while not budget.finished:
            train_an_epoch(budget.epoch)  # counted from 0; a last third may be repeated
            schedule.step()
            budget.step()

    The result is the last network of the last third of the epochs within the budget. If there is
    none, ``model`` and everything in ``restore`` go back to before these epochs, ``budget.epoch``
    as well, and the losses get half their weight; if necessary a second time, with a quarter. If
    that is not enough, the weights are interpolated towards ``start``. The method, with its
    sources: :class:`divqat.nn.budget_search.BudgetSearch`, which the command uses, too. Random
    numbers are not taken back, so that repeated epochs see other augmentations, unless the loop
    seeds every epoch. A threshold of rejection (``target="reject"``) is not set; only the command
    does that.

    A loop that cannot repeat epochs passes ``rewinds=0``; one that stops early calls
    :meth:`finish`. In distributed training every process has its own budget, and ``validate`` must
    return the same number in all of them (reduced, or broadcast from one): each decides for itself.

    Args:
        model: the prepared model itself, without DistributedDataParallel or another wrapper around
            it; or its weight average, with the trained model in ``restore``.
        losses: whose weights are halved; a term of your own can be multiplied by ``strength``.
            A DivQATLoss with a negative weight distills and is no defense: leave it out.
        validate: from the model, in eval mode and without gradients, to its accuracy on validation
            images, from 0 to 1. It is called after each of the last third of the epochs, and up to
            22 times at the end. Modes are restored afterwards.
        reference: the accuracy of a model without defense, best plain QAT, from 0 to 1.
        points: the loss that is allowed, in percentage points, at least 0.01: 0.5 is half a point.
        epochs: the length of the training, without repetitions.
        start: the state dict of plain QAT, prepared in the same way, or of the float model; copied.
            None: the model's present weights, which are then those of the float model. Activation
            ranges that it lacks keep their trained values.
        restore: what else to take back with the model: optimizer, schedule, GradScaler, weight
            average.
        rewinds: how often the last third may be repeated, at least 0.

    Attributes:
        epoch: the number of epochs done, which is that of the next one, counted from 0.
        finished: whether the training is over; ``model`` is the result then.

    Raises:
        TypeError: ``model`` is not a module, or a loss not one of these.
        ValueError: a number is out of its range, a loss has no weight above 0, or there is none.
        Others: see ``load_state_dict``, for ``start``.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Loss | Sequence[Loss],
        validate: Callable[[nn.Module], float | Tensor],
        *,
        reference: float,
        points: float,
        epochs: int,
        start: Mapping[str, Any] | None = None,
        restore: Sequence[Stateful] = (),
        rewinds: int = REWINDS,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: wanted a prepared module, got {type(model).__name__}")
        self.losses = [losses] if isinstance(losses, nn.Module) else list(losses)
        self.weights = [_weight(loss) for loss in self.losses]
        if not self.losses:
            raise ValueError("losses: wanted at least one, got none")
        if not LEAST <= points < 100:
            raise ValueError(
                f"points: wanted percentage points of accuracy, from {LEAST} to below 100 (half a "
                f"point is 0.5, not 0.005), got {points}"
            )
        for name, value, least in (("epochs", epochs, 1), ("rewinds", rewinds, 0)):
            if value < least:
                raise ValueError(f"{name}: wanted at least {least}, got {value}")
        reference = _fraction("reference", reference)
        self.model, self.validate, self.epochs = model, validate, epochs
        self.restore = list(restore)
        self.search = BudgetSearch(points, reference, _start_of(model, start), rewinds)
        self.epoch, self.finished = 0, False
        self._begin_last_third()

    @property
    def strength(self) -> float:
        """The present share of the losses' weights: 1, 0.5 or 0.25."""
        return self.search.strength

    @property
    def longest(self) -> int:
        """The epochs of a training that is repeated as often as allowed; frameworks that ask for a
        number of epochs need this one, and stop when ``finished``."""
        return self.epochs + self.search.rewinds * (self.epochs - last_third(self.epochs))

    def step(self) -> None:
        """Count an epoch; in the last third validate, keep the model, and at the end go back or
        finish. Call it when the schedule has made its step, too.

        Raises:
            RuntimeError: the training is finished.
            TypeError, ValueError: ``validate`` does not return a number from 0 to 1.
        """
        if self.finished:
            raise RuntimeError("step: wanted a training that is not finished, got a finished one")
        self.epoch += 1
        if self.search.kept is not None and self.search.allows(self._accuracy()):
            self.search.keep(self.model, self.epoch)
        if self.epoch < self.epochs:
            self._begin_last_third()
            return
        state = self.search.end(self.model, self.epoch, self._measure)
        if state is None:
            self._finished()
            return
        self.model.load_state_dict(state["model"])
        for item, saved in zip(self.restore, state["restored"], strict=True):
            item.load_state_dict(saved)
        self.epoch = state["epoch"]
        self._set_weights()

    def finish(self) -> None:
        """End the training now: go to the last model within the budget, or interpolate the present
        weights, without repeating an epoch. Nothing happens if it is finished.

        Raises:
            RuntimeError: the last third was just taken back, and nothing was trained since.
        """
        if self.finished:
            return
        if self._went_back():
            raise RuntimeError(
                f"finish: wanted the epochs after {self.epoch} repeated with {self.strength:g} of "
                "the weight, got the end right after going back: loop while not budget.finished, "
                "or pass rewinds=0"
            )
        self.search.rewinds = 0
        self.search.end(self.model, self.epoch, self._measure)
        self._finished()

    def message(self) -> str:
        """How the budget stands, as a log line."""
        if self.finished:
            return self.search.message()
        if self._went_back():
            return self.search.rewind_message(self.epoch)
        part = f", with {self.strength:g} of the defense's weight" if self.search.attempts else ""
        return f"accuracy budget: epoch {self.epoch} of {self.epochs}{part}"

    def summary(self) -> dict[str, Any]:
        """The result and how it came about, as plain data; when ``finished``.

        Returns:
            ``points``, ``reference``; ``share`` of the way from ``start`` to the trained weights;
            ``points_below`` the reference, and whether that is ``inside``; ``weaker``, the
            ``strength``; ``attempts`` and ``path``, see :class:`BudgetSearch`.
        """
        return self.search.summary()

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints. It holds up to three copies of the model, and one of what is restored.

        A training that is resumed from the states of model, ``restore`` and budget after
        :meth:`step` continues like an uninterrupted one.
        """
        search = {name: getattr(self.search, name) for name in SEARCH}
        return {**search, **{name: getattr(self, name) for name in OWN}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`, and set the losses' weights.

        Raises:
            ValueError: it belongs to another reference, other points, epochs or losses.
        """
        ours = self.state_dict()
        for name in ("reference", "points", "epochs"):
            if state_dict[name] != ours[name]:
                raise ValueError(
                    f"{name}: wanted {state_dict[name]}, with which the training started, got "
                    f"{ours[name]}"
                )
        if len(state_dict["weights"]) != len(self.losses):
            raise ValueError(
                f"losses: wanted {len(state_dict['weights'])}, as when the training started, got "
                f"{len(self.losses)}"
            )
        state = deepcopy(dict(state_dict))
        for target, names in ((self.search, SEARCH), (self, OWN)):
            for name in names:
                setattr(target, name, state[name])
        self._set_weights()

    def _begin_last_third(self) -> None:
        """Copy the state of the training if the last third begins now."""
        if self.epoch == last_third(self.epochs) and self.search.kept is None:
            restored = [item.state_dict() for item in self.restore]
            model = self.model.state_dict()
            self.search.begin({"epoch": self.epoch, "model": model, "restored": restored})

    def _went_back(self) -> bool:
        """Whether the last third was taken back and no epoch was trained since."""
        return bool(self.search.attempts) and self.epoch == last_third(self.epochs)

    def _set_weights(self) -> None:
        for loss, weight in zip(self.losses, self.weights, strict=True):
            loss.set_weight(self.strength * weight)

    def _measure(self, epoch: int) -> dict[str, float]:
        return {"epoch": epoch, "validation_accuracy": self._accuracy()}

    @torch.no_grad()
    def _accuracy(self) -> float:
        with modes_kept(self.model):
            return _fraction("validate", self.validate(self.model.eval()))

    def _finished(self) -> None:
        self.finished = True
        if warning := self.search.warning():
            warnings.warn(warning, stacklevel=3)


def _weight(loss: Loss) -> float:
    if not isinstance(loss, MisdirectionLoss | DivQATLoss):
        raise TypeError(
            f"losses: wanted MisdirectionLoss or DivQATLoss, got {type(loss).__name__}; multiply "
            "other terms by the budget's strength"
        )
    weight = float(loss.final_weight if isinstance(loss, DivQATLoss) else loss.weight)
    if not weight > 0:
        raise ValueError(
            f"losses: wanted a weight above 0, got a {type(loss).__name__} with {weight:g}, which "
            "is no defense that could be weakened: leave it out"
        )
    return weight


def _fraction(name: str, value: float | Tensor) -> float:
    """An accuracy from 0 to 1."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: wanted an accuracy from 0 to 1, got {value!r}") from error
    if not 0 <= number <= 1:
        hint = "" if not 1 < number <= 100 else "; if these are percent, divide by 100"
        raise ValueError(f"{name}: wanted an accuracy from 0 to 1, got {number:g}{hint}")
    return number


@torch.no_grad()
def _start_of(model: nn.Module, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """θ₀ with the names of the prepared ``model``, as a copy."""
    if start is None:
        return without_ranges(deepcopy(model.state_dict()))
    copy = deepcopy(model)
    copy.load_state_dict(start)
    state = copy.state_dict()
    return state if any("fake_quantize" in name for name in start) else without_ranges(state)
