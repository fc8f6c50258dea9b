"""The loss of DivQAT as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from divqat.ops import divergence_loss_terms
from divqat.ops._check import check_choice
from divqat.ops.divergence_loss import CLASSES, DIRECTIONS


class DivQATLoss(nn.CrossEntropyLoss):
    """CE − λ T² · divergence from a frozen teacher; see :func:`divqat.ops.divergence_loss`.

    An ``nn.CrossEntropyLoss`` without class weights: ``weight`` is λ.

    Call it as ``loss(logits, target, teacher_logits)``. Without ``teacher_logits`` λ must be 0, and
    the loss is ``nn.CrossEntropyLoss``. After a call ``ce`` and ``divergence`` hold the two means,
    [], detached and on the device.

    Args:
        weight: λ; negative to move towards the teacher (knowledge distillation).
        temperature, direction, classes, bound, guard: see the op.
        warmup_steps: λ rises linearly from 0 over this many calls of :meth:`step`.
        label_smoothing, ignore_index: those of ``nn.CrossEntropyLoss``.

    Raises:
        ValueError: a value is out of its range.
    """

    final_weight: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: float = 0.0,
        *,
        temperature: float = 1.0,
        direction: str = "student_teacher",
        classes: str = "all",
        bound: float | None = None,
        guard: bool = False,
        warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, ignore_index=ignore_index)
        check_choice("direction", direction, DIRECTIONS)
        check_choice("classes", classes, CLASSES)
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: wanted >= 0, got {warmup_steps}")
        self.temperature = temperature
        self.direction = direction
        self.classes = classes
        self.bound = bound
        self.guard = guard
        self.warmup_steps = warmup_steps
        # λ and the step of the warm-up are tensors, so that a new value neither triggers a
        # recompilation nor outdates a captured CUDA graph.
        self.register_buffer("final_weight", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.set_weight(weight)
        self.ce: Tensor | None = None
        self.divergence: Tensor | None = None

    def set_weight(self, weight: float) -> None:
        """Set λ, as it is after the warm-up."""
        if not math.isfinite(weight):
            raise ValueError(f"weight: wanted a number, got {weight}")
        self.final_weight.fill_(weight)
        self.enabled = weight != 0  # for the op, λ = 0 is plain cross-entropy

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.enabled = bool(self.final_weight != 0)

    def step(self) -> None:
        """Advance the warm-up; call it after every training step."""
        self.steps += 1

    def forward(
        self,
        input: Tensor,  # [N, C]
        target: Tensor,  # [N]
        teacher_logits: Tensor | None = None,  # [N, C]
    ) -> Tensor:
        """The loss, []; its gradient goes to ``input`` only.

        Raises:
            ValueError: ``teacher_logits`` is None although λ is not 0, or ``classes`` is
                ``non_label`` with two classes.
        """
        weight: float | Tensor = 0.0
        if self.enabled:
            if teacher_logits is None:
                raise ValueError("teacher_logits: wanted [N, C], as weight is not 0, got None")
            if self.classes == "non_label" and input.shape[-1] == 2:
                raise ValueError(
                    "classes: wanted all with two classes, got non_label: a single other class "
                    "always has probability 1, so the divergence would be 0"
                )
            weight = self.final_weight
            if self.warmup_steps:
                weight = weight * ((self.steps + 1) / self.warmup_steps).clamp(max=1.0)
        elif teacher_logits is None:
            teacher_logits = input.detach()
        loss, self.ce, self.divergence = divergence_loss_terms(
            input,
            teacher_logits,
            target,
            weight=weight,
            temperature=self.temperature,
            direction=self.direction,
            classes=self.classes,
            bound=self.bound,
            guard=self.guard,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        return loss
