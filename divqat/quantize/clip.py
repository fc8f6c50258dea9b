"""Ranges for post-training quantization: where to clip a tensor, from all of its values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from divqat.nn.fake_quantize import FakeQuantize
from divqat.nn.spec import QuantSpec
from divqat.ops.qparams import EPS, choose_qparams

ACTIVATION_RANGES = ("average", "minmax", "percentile", "mse", "entropy")
# A channel has too few values for a percentile or a histogram.
WEIGHT_RANGES = ("minmax", "mse")
BINS = 2048
# The ends of a range that are tried are these parts of the largest values.
FRACTIONS = torch.arange(1, 65, dtype=torch.float64) / 64


class Histogram:
    """Counts of a tensor's values over many batches, in ``BINS`` bins from ``low`` to ``high``.

    Args:
        low, high: the range, which includes 0.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.width = (high - low) / BINS

    def add(self, x: Tensor) -> None:
        """Count the values of a batch."""
        if self.width:
            bins = ((x.double().flatten() - self.low) / self.width).long().clamp(0, BINS - 1)
            self.counts += torch.bincount(bins, minlength=BINS).cpu()

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64 [BINS]."""
        return self.low + self.width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def range(self, kind: str, spec: QuantSpec, percentile: float) -> tuple[float, float]:
        """The two ends of the range to quantize.

        Args:
            kind: one of ``ACTIVATION_RANGES`` but ``"average"``.
            spec: the grid.
            percentile: for ``"percentile"``.
        """
        if kind == "minmax" or not self.width:
            return self.low, self.high
        if kind == "percentile":
            share = self.counts.cumsum(0) / self.counts.sum()
            inside = (share >= 1 - percentile / 100) & (
                share - self.counts / self.counts.sum() < percentile / 100
            )
            first, last = inside.nonzero()[[0, -1], 0].tolist()
            low, high = self.low + first * self.width, self.low + (last + 1) * self.width
            return min(low, 0.0), max(high, 0.0)
        # The two ends are searched independently; one that is 0 stays.
        ends = (
            FRACTIONS * end if end else torch.zeros(1).double() for end in (self.low, self.high)
        )
        low_ends, high_ends = (grid.flatten() for grid in torch.meshgrid(*ends, indexing="ij"))
        score = self._squared_error if kind == "mse" else self._divergence
        scores = [
            score(low, high, spec)
            for low, high in zip(low_ends.split(256), high_ends.split(256), strict=True)
        ]
        # of equal ranges the last, which clips least
        best = len(low_ends) - 1 - int(torch.cat(scores).flip(0).argmin())
        return float(low_ends[best]), float(high_ends[best])

    def _codes(self, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The codes [K, BINS] of the bins in K ranges, from 0, and the values of these codes."""
        grid = spec.quant_min, spec.quant_max
        scale, zero_point = (
            q.double()[:, None] for q in choose_qparams(low, high, *grid, symmetric=spec.symmetric)
        )
        codes = ((self.centers / scale).round() + zero_point).clamp(*grid)
        return (codes - spec.quant_min).long(), (codes - zero_point) * scale

    def _squared_error(self, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
        """Σ counts · (Q(x) − x)² for each of K ranges, float64 [K]."""
        return ((self._codes(low, high, spec)[1] - self.centers) ** 2 * self.counts).sum(1)

    def _divergence(self, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
        """KL(P‖Q) for each of K ranges, float64 [K] (Migacz, "8-bit inference with TensorRT", GTC
        2017): P are the counts with those outside moved into the range's last bins; Q are the
        counts inside, those of each code spread evenly over its bins that are not empty."""
        codes = self._codes(low, high, spec)[0]
        inside = (self.centers >= low[:, None]) & (self.centers <= high[:, None])
        first, last = inside.int().argmax(1), BINS - 1 - inside.flip(1).int().argmax(1)
        bins = torch.arange(BINS).expand_as(codes)
        bins = bins.clamp(first[:, None], last[:, None])
        counts = self.counts.expand(codes.shape)
        p = torch.zeros_like(counts).scatter_add(1, bins, counts)
        filled = (counts > 0) & inside
        levels = torch.zeros(len(low), 2**spec.bits, dtype=torch.float64)
        sums = levels.scatter_add(1, codes, counts * inside)
        shares = levels.scatter_add(1, codes, filled.double()).clamp(min=1)
        q = (sums / shares).gather(1, codes) * filled
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True).clamp(min=1e-300)
        return torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-12)).log(), 0).sum(1)


@torch.no_grad()
def set_ranges(model: nn.Module, batches: list[Tensor], kind: str, percentile: float) -> None:
    """Set the range of every activation of ``model``, which is in eval mode and quantizes no
    activation, from two passes over ``batches``: its ends, then its histogram."""
    ends: dict[FakeQuantize, tuple[float, float]] = {}

    def widen(quantizer: FakeQuantize, x: Tensor) -> None:
        if not x.isfinite().all():
            raise FloatingPointError("batches: wanted finite activations, got NaN or Inf")
        low, high = ends.get(quantizer, (0.0, 0.0))
        ends[quantizer] = min(low, x.min().item()), max(high, x.max().item())

    with _inputs(model, widen):
        for batch in batches:
            model(batch)
    histograms = {quantizer: Histogram(*pair) for quantizer, pair in ends.items()}
    if kind != "minmax":
        with _inputs(model, lambda quantizer, x: histograms[quantizer].add(x)):
            for batch in batches:
                model(batch)
    for quantizer, histogram in histograms.items():
        low, high = histogram.range(kind, quantizer.spec, percentile)
        quantizer.running_min.fill_(low)
        quantizer.running_max.fill_(high)
        quantizer.calculate_qparams()
        quantizer.calibrated = True


@contextmanager
def _inputs(model: nn.Module, see: object) -> Iterator[None]:
    """A block in which ``see(quantizer, x)`` gets what each quantizer reads, after its ReLU."""

    def hook(quantizer: FakeQuantize, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        if x.numel():
            see(quantizer, x.relu() if quantizer.relu else x)  # type: ignore[operator]

    handles = [
        module.register_forward_pre_hook(hook)
        for module in model.modules()
        if isinstance(module, FakeQuantize)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weight_clip(
    rows: Tensor,  # [C, n]
    quant_max: int,
) -> Tensor:
    """The scale [C], float32, of the symmetric grid ±quant_max with the least squared error of each
    row; the largest of equal ones."""
    rows = rows.double()
    largest = rows.abs().amax(1)
    best, least = largest / quant_max, torch.full_like(largest, torch.inf)
    for fraction in FRACTIONS.flip(0).tolist():
        scale = (fraction * largest / quant_max).clamp(min=EPS)[:, None]
        codes = (rows / scale).round().clamp(-quant_max, quant_max)
        error = ((codes * scale - rows) ** 2).sum(1)
        best = torch.where(error < least, scale[:, 0], best)
        least = torch.minimum(error, least)
    return best.clamp(min=EPS).float()
