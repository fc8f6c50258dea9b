"""How good a model's answers are, measured under many settings in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divqat._util.progress import progress


@dataclass(frozen=True)
class Score:
    """The answers under one setting. Shares are fractions in [0, 1].

    Attributes:
        loss: mean cross-entropy with the labels, in nats; None without labels.
        accuracy: share of images whose largest logit is that of the label; None without labels.
        agreement: share of images with the same largest logit as in the reference.
        divergence: mean KL(p‖q) in nats, p the reference's softmax and q this one's.
        sqnr_db: signal to quantization noise ratio of the logits, 10 log10(Σ p² / Σ (p − q)²) with
            the reference's logits p, in decibels; None without signal or noise.
    """

    loss: float | None
    accuracy: float | None
    agreement: float
    divergence: float
    sqnr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def cells(self) -> tuple[str, str, str, str]:
        """Loss, accuracy, agreement and SQNR as text."""
        return (
            "-" if self.loss is None else f"{self.loss:.4f}",
            "-" if self.accuracy is None else f"{self.accuracy:.2%}",
            f"{self.agreement:.2%}",
            "-" if self.sqnr_db is None else f"{self.sqnr_db:.1f}",
        )


class _Sums:
    """The sums over images that make a :class:`Score`, in float64."""

    def __init__(self) -> None:
        self.images = 0
        self.loss, self.divergence, self.noise, self.signal = 0.0, 0.0, 0.0, 0.0
        self.right, self.same = 0, 0

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor | None) -> None:
        """Add a batch: float64 [N, num_classes] twice, and int64 [N] or None."""
        self.images += len(logits)
        log_q, log_p = logits.log_softmax(1), reference.log_softmax(1)
        self.divergence += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        self.noise += float((reference - logits).square().sum())
        self.signal += float(reference.square().sum())
        self.same += int((logits.argmax(1) == reference.argmax(1)).sum())
        if labels is not None:
            self.loss += float(F.nll_loss(log_q, labels, reduction="sum"))
            self.right += int((logits.argmax(1) == labels).sum())

    def score(self, labeled: bool) -> Score:
        n = self.images
        known = self.signal > 0 and self.noise > 0
        return Score(
            loss=self.loss / n if labeled else None,
            accuracy=self.right / n if labeled else None,
            agreement=self.same / n,
            divergence=self.divergence / n,
            sqnr_db=10 * math.log10(self.signal / self.noise) if known else None,
        )


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    settings: Sequence[Callable[[], None]],
    *,
    description: str = "sensitivity",
) -> tuple[list[Score], int]:
    """Score a model under each setting. The batches are read once, and each is answered under all
    settings from the same state of torch's random numbers.

    Args:
        model: in eval mode; returns logits [N, num_classes].
        batches: see :func:`divqat.sensitivity`.
        settings: each changes the model to one setting; the first is the reference of the others.
        description: of the progress bar.

    Returns:
        A score for each setting, and the number of images.

    Raises:
        TypeError, ValueError: ``batches`` or the model's output is not as described.
        FloatingPointError: a logit is NaN or Inf.
    """
    sums = [_Sums() for _ in settings]
    labeled: bool | None = None
    gpus = _gpus(model)
    for images, labels in _read(model, batches, len(settings), description):
        if labeled is not None and labeled != (labels is not None):
            raise ValueError("batches: wanted labels in all batches or in none, got both")
        labeled = labels is not None
        reference: Tensor | None = None
        for apply, total in zip(settings, sums, strict=True):
            apply()
            with torch.random.fork_rng(gpus):
                logits = _logits(model(images), len(images))
            if reference is None:
                reference = logits
                _check_labels(labels, logits)
            total.add(logits, reference, labels)
    if not sums[0].images:
        raise ValueError("batches: wanted at least one image, got none")
    return [total.score(bool(labeled)) for total in sums], sums[0].images


def _read(
    model: nn.Module, batches: Iterable[Any], runs: int, description: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images on the model's device, and labels on the CPU or None, of every batch that has any."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches: wanted an iterable of (images, labels), got {type(batches).__name__}"
        )
    total = len(batches) if isinstance(batches, Sized) else None
    for batch in progress(batches, f"{description}, {runs} runs", total=total, unit="batch"):
        images, labels = batch, None
        if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
            images, labels = (*batch, None)[:2]
        if not isinstance(images, Tensor) or not isinstance(labels, (Tensor, type(None))):
            raise TypeError(
                "batches: wanted images or (images, labels), got "
                + (f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else repr(type(batch)))
            )
        if not images.is_floating_point():
            raise TypeError(f"batches: wanted float images, got {images.dtype}")
        if len(images):
            yield images if tensor is None else images.to(tensor.device), _on_cpu(labels)


def _on_cpu(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.cpu()


def _logits(output: object, n: int) -> Tensor:  # float64 [N, num_classes] on the CPU
    wanted = "model: wanted one tensor of logits [N, num_classes], got"
    if not isinstance(output, Tensor):
        raise TypeError(f"{wanted} {type(output).__name__}")
    if output.dim() != 2 or len(output) != n or not output.is_floating_point():
        raise ValueError(f"{wanted} {output.dtype} {list(output.shape)} for {n} images")
    logits = output.detach().cpu().double()
    if not logits.isfinite().all():
        raise FloatingPointError("model: wanted finite logits, got NaN or Inf")
    return logits


def _check_labels(labels: Tensor | None, logits: Tensor) -> None:
    if labels is None:
        return
    n, classes = logits.shape
    if labels.dtype != torch.int64 or labels.shape != (n,):
        raise ValueError(
            f"batches: wanted labels int64 [{n}], got {labels.dtype} {list(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"batches: wanted labels 0 to {classes - 1}, got {low} to {high}")


def _gpus(model: nn.Module) -> list[int]:
    """The indices of the CUDA devices that hold a part of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
