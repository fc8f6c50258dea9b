"""The accuracy budget: how much of the defense a loss of validation accuracy allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.devices import fingerprint
from divqat.data import LabeledImages
from divqat.metrics import accuracy, predict
from divqat.nn.budget_search import REWINDS, STEPS, BudgetSearch, interpolate, without_ranges
from divqat.nn.budget_search import within as _within
from divqat.quantize.rectify import output_bias, output_quantizer
from divqat.train.config import QUANTIZATION, SHARED, TrainConfig
from divqat.train.folder import Run, load_run
from divqat.train.network import build_model

__all__ = ["REWINDS", "STEPS", "Budget", "interpolate", "load_reference", "reference_weights"]


class Budget(BudgetSearch):
    """The :class:`divqat.nn.budget_search.BudgetSearch` of ``divqat train``.

    A network that rejects foreign images (``misdirect_target`` reject) has a threshold besides,
    below which its largest logit counts as a rejection: the largest that the budget allows. Since
    accuracy falls with it, a loss of accuracy that is left is spent on rejecting more.

    Args:
        points, reference, start: see the base class.

    Attributes:
        threshold: what was subtracted from the logits of a network that rejects.
        attempts: see the base class; also how many ``seconds`` the discarded epochs took.
    """

    remedies = (
        "name a reference, or try a larger budget",
        "try lr_warmup_epochs, more epochs, a smaller lr, weight or misdirect, or a larger budget",
    )

    def __init__(self, points: float, reference: float, start: Mapping[str, Any]) -> None:
        super().__init__(points, reference, start, REWINDS)
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

    def is_within(self, points_below: float) -> bool:
        return _within(points_below, self.points)  # looked up here, where tests replace it

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

    def summary(self) -> dict[str, Any]:
        """The entry ``budget`` of ``summary.json``."""
        return {**super().summary(), "threshold": self.threshold}

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


def reference_weights(config: TrainConfig, run: Run) -> dict[str, Any]:
    """The state dict of ``run`` with the parameter names of the model that ``config`` trains, where
    BatchNorms are folded into convolutions. From a full-precision run it has no ranges."""
    if run.config.kind.quantized:
        return run.model.state_dict()
    model = build_model(config, run.shape)
    model.load_state_dict(run.model.state_dict())
    return without_ranges(model.state_dict())


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
