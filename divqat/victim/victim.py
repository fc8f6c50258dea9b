"""The black box that an attacker queries: it counts and limits queries and releases answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from divqat._util.errors import unknown_name
from divqat.victim.answers import keep_top, label_only
from divqat.victim.runners import check_images, logits_function

# From probabilities [N, num_classes] and images [N, C, H, W] to released answers.
Defense = Callable[[Tensor, Tensor], Tensor]
ANSWERS = ("probs", "label", "topk", "rounded")


class QueryBudgetExceeded(RuntimeError):
    """A query exceeds the budget; none of its images was answered or counted."""


class Victim:
    """A deployed model as a black box that only answers images.

    Args:
        model: an ``nn.Module`` in eval mode, the path of an ONNX file, an open
            ``onnxruntime.InferenceSession``, or any function from float32 images [N, C, H, W] to
            logits [N, num_classes]. Probabilities instead of logits are accepted with a warning,
            see :func:`divqat.victim.runners.logits_function`. No public attribute of the victim
            exposes the model.
        answer: the part of the probabilities that is released:
            ``"probs"`` all of them; ``"label"`` the most probable class as a one-hot row;
            ``"topk"`` the ``k`` largest, zero elsewhere, not renormalized; ``"rounded"`` all,
            rounded to ``decimals`` places, not renormalized. Ties go to the lower class index.
        k: for ``"topk"`` only.
        decimals: for ``"rounded"`` only.
        defense: a function from probabilities [N, num_classes] and images [N, C, H, W], both
            float32 on the CPU, to answers of the same shape as the probabilities; ``answer`` is
            applied to its result. See :mod:`divqat.defenses`.
        query_budget: maximum number of answered images in total; None: no limit.
        batch_size: images per forward pass of the model.

    Raises:
        TypeError: ``model`` is none of the above.
        ValueError: an argument is out of its range, a module is in training mode, or an ONNX model
            does not have one input [N, C, H, W], float32 or uint8, and one output, or declares
            an input that it does not take (:class:`divqat.export.InputMetadata`).
        FileNotFoundError: there is no such ONNX file.
        ImportError: ``model`` is an ONNX file, but onnxruntime is missing.

    Example:
        >>> victim = Victim(lambda images: images.flatten(1), answer="label", query_budget=10)
        >>> victim(torch.eye(2).view(2, 1, 1, 2))
        tensor([[1., 0.],
                [0., 1.]])
        >>> victim.queries, victim.remaining
        (2, 8)
    """

    def __init__(
        self,
        model: Any,
        *,
        answer: str = "probs",
        k: int | None = None,
        decimals: int | None = None,
        defense: Defense | None = None,
        query_budget: int | None = None,
        batch_size: int = 256,
    ) -> None:
        if answer not in ANSWERS:
            raise unknown_name("answer", answer, ANSWERS)
        for name, value, owner, least in (
            ("k", k, "topk", 1),
            ("decimals", decimals, "rounded", 0),
        ):
            if answer != owner and value is not None:
                raise ValueError(f"{name}: only answer={owner!r} takes it, got answer={answer!r}")
            if answer == owner and (value is None or value < least):
                raise ValueError(f"{name}: answer={owner!r} needs at least {least}, got {value}")
        if query_budget is not None and query_budget < 0:
            raise ValueError(f"query_budget: wanted None or at least 0, got {query_budget}")
        if batch_size < 1:
            raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
        self._logits = logits_function(model)
        self._answer, self._k, self._decimals = answer, k, decimals
        self._defense = defense
        self._query_budget, self._batch_size = query_budget, batch_size
        self._queries = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Answer images.

        Args:
            images: floating-point [N, C, H, W] in [-1, 1], on any device.

        Returns:
            float32 [N, num_classes] on the CPU.

        Raises:
            QueryBudgetExceeded: before any image is answered; ``queries`` does not change.
            TypeError, ValueError: ``images`` is not a finite, floating-point, non-empty 4-d tensor.
            FloatingPointError: the model's output contains NaN or Inf.
        """
        check_images(images)
        if self.remaining is not None and len(images) > self.remaining:
            raise QueryBudgetExceeded(
                f"got {len(images)} images, but {self.remaining} of {self._query_budget} "
                "queries remain"
            )
        parts = images.detach().split(self._batch_size)
        answers = torch.cat([self._release(self._logits(part), part) for part in parts])
        self._queries += len(images)
        return answers

    def __repr__(self) -> str:
        return f"Victim({self.answer}, queries={self.queries}, remaining={self.remaining})"

    @property
    def queries(self) -> int:
        """Images answered so far."""
        return self._queries

    @property
    def remaining(self) -> int | None:
        """Queries that the budget still allows; None without a budget."""
        return None if self._query_budget is None else self._query_budget - self._queries

    @property
    def answer(self) -> str:
        """The released part: ``probs``, ``label``, ``top<k>`` or ``rounded<decimals>``."""
        return {"topk": f"top{self._k}", "rounded": f"rounded{self._decimals}"}.get(
            self._answer, self._answer
        )

    @property
    def defense(self) -> str:
        """The defense as text: its settings, or the name of a function; ``none`` without one."""
        return "none" if self._defense is None else defense_text(self._defense)

    def _release(self, logits: Tensor, images: Tensor) -> Tensor:
        probs = order = logits.softmax(1)
        if self._defense is None:
            # Logits can differ where probabilities round to the same float.
            order = logits
        else:
            probs = order = self._defend(probs, images)
        if self._answer == "probs":
            return probs
        if self._decimals is not None:
            return probs.round(decimals=self._decimals)
        return label_only(order) if self._k is None else keep_top(probs, self._k, by=order)

    def _defend(self, probs: Tensor, images: Tensor) -> Tensor:
        assert self._defense is not None
        released = self._defense(probs, images.to("cpu", torch.float32))
        if released.shape != probs.shape or not released.isfinite().all():
            raise ValueError(
                f"defense: wanted finite {list(probs.shape)} from {self.defense}, "
                f"got {list(released.shape)} with {int((~released.isfinite()).sum())} not finite"
            )
        return released


def defense_text(defense: Defense) -> str:
    """A text that identifies a defense, the same in every process."""
    return str(getattr(defense, "__qualname__", defense))
