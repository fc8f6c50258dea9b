"""Fake-quantizer modules with an observed or a learned scale."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from divqat.nn._state import QuantizerState
from divqat.nn.observer import MovingAverageMinMaxObserver, qparam_shape
from divqat.nn.spec import ACTIVATION, QuantSpec
from divqat.ops import fake_quantize_lsq
from divqat.ops.qparams import EPS, choose_qparams, positive

# A scale that was never set. It is negative, finite and huge: an average that began with it stays
# negative and can be detected.
UNSET = -(2.0**100)


class FakeQuantize(MovingAverageMinMaxObserver):
    """Observe the range in training mode and fake-quantize with it.

    ``observer_enabled`` and ``fake_quant_enabled`` are Python bools (tensor flags would break
    export and CUDA graphs) and part of the state dict. Before the first observed batch the input
    passes unchanged. A copy from before the first batch, such as a weight average, may get a range
    by its buffers alone: until it has one, every call without observation checks for it, with a
    host sync.

    Args:
        spec, ch_axis, num_channels: see :class:`MovingAverageMinMaxObserver`.
        mode: ``"exact"`` or ``"delayed"``, see :func:`divqat.ops.fake_quantize_observed`; the
            first batch is exact in both. ``torch.utils.checkpoint`` needs ``"exact"``: with
            ``"delayed"`` the range before the batch is lost when it recomputes the forward, which
            raises a RuntimeError.
        relu: apply ReLU first, in the same op.
        inplace: overwrite the input, see :func:`divqat.ops.fake_quantize_observed`.
    """

    SWITCHES = ("observer_enabled", "fake_quant_enabled", "calibrated")

    def __init__(
        self,
        spec: QuantSpec = ACTIVATION,
        *,
        ch_axis: int | None = None,
        num_channels: int | None = None,
        mode: str = "exact",
        relu: bool = False,
        inplace: bool = False,
    ) -> None:
        super().__init__(spec, ch_axis=ch_axis, num_channels=num_channels)
        self.mode = mode
        self.relu = relu
        self.inplace = inplace
        self.fake_quant_enabled = True
        self.calibrated = False  # known to have a range: scale and zero point are valid

    def reset_parameters(self) -> None:
        """Reset the range."""
        super().reset_parameters()
        self.calibrated = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` fake-quantized; any shape, dtype kept."""
        observing = self._observes()
        if not self.training:
            self.calculate_qparams()  # the range may be an average
        # self.calibrated is read only where needed: torch.compile guards on what was read, and
        # would recompile after the first batch.
        calibrated = (observing and self.mode == "exact") or self.calibrated
        if not (observing or calibrated):
            if torch.compiler.is_compiling():
                return self._quantize_if_ranged(x)
            self.calibrated = calibrated = self.has_range()
            if not calibrated and self.fake_quant_enabled:
                _warn_float()
        if observing and x.numel():
            self.calibrated = True
        return self._observed(
            x,
            fake_quant=self.fake_quant_enabled and (observing or calibrated),
            mode=self.mode if calibrated else "exact",
            relu=self.relu,
            inplace=self.inplace,
        )

    def has_range(self) -> bool:
        """Whether scale and zero point are valid; reads the buffers on the host.

        A first batch with NaN or Inf sets ``calibrated`` but leaves the range empty.

        Raises:
            RuntimeError: the range is an average that began before the first batch.
        """
        if self._ranged():
            return True
        empty = self.running_min.isposinf() & self.running_max.isneginf()
        untouched = empty & (self.scale == 1) & (self.zero_point == 0)
        if not (untouched | self.running_min.isfinite() & self.running_max.isfinite()).all():
            raise _average_error(
                "running_min, running_max", "a range", self.running_min, self.running_max
            )
        return False

    def quantizes(self) -> bool:
        """Whether the last call quantized its input."""
        return self.fake_quant_enabled and self.calibrated

    def _ranged(self) -> Tensor:  # bool []
        return (self.running_min.isfinite() & self.running_max.isfinite()).all()

    def _quantize_if_ranged(self, x: Tensor) -> Tensor:
        """``x``, quantized if there is a range; decided on the device, without a host sync."""
        positive = x.relu() if self.relu else x
        if not self.fake_quant_enabled:
            return positive
        return torch.where(self._ranged(), self._observed(x, relu=self.relu), positive)

    def disable_observer(self) -> None:
        """Freeze scale and zero point."""
        self.observer_enabled = False

    def enable_observer(self) -> None:
        """Resume observation."""
        self.observer_enabled = True


class LearnedStepFakeQuantize(QuantizerState):
    """Fake quantization with a learned scale (LSQ) and, on an affine grid, a learned offset (LSQ+).

    On a symmetric grid the scale starts at 2 · mean|x| / sqrt(quant_max) of the first training
    batch (Esser et al. 2020, §2.1); on an affine grid scale and offset start at the batch's range.
    If the first batch has NaN or Inf, they start at 1 and 0. Both gradients are multiplied by
    1 / sqrt(n · quant_max), with n the number of elements that share a scale (§2.2).

    If an optimizer step moves the scale to ε = 2⁻²³ or below, the next forward in training mode
    sets it to ε, where its gradient can only raise it (:func:`divqat.ops.fake_quantize_lsq`). So
    the scale recovers with any optimizer and step size, and no smaller scale is ever used.

    Args:
        spec, ch_axis, num_channels: see :class:`MovingAverageMinMaxObserver`.
    """

    SWITCHES = ("fake_quant_enabled", "initialized")
    relu = False  # never fused here: the gradient of the scale would have to account for it

    def __init__(
        self,
        spec: QuantSpec = ACTIVATION,
        *,
        ch_axis: int | None = None,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        shape = qparam_shape(ch_axis, num_channels)
        self.spec = spec
        self.ch_axis = ch_axis
        self.fake_quant_enabled = True
        self.initialized = False
        self.scale = nn.Parameter(torch.empty(shape))
        if spec.symmetric:
            self.register_buffer("zero_point", torch.empty(shape))
        else:
            self.zero_point = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset scale and offset."""
        spec = self.spec
        middle = (spec.quant_max + 1) // 2 if spec.symmetric and not spec.signed else 0
        self.scale.fill_(UNSET)
        self.zero_point.fill_(middle)
        self.initialized = False

    def set_extra_state(self, state: Any) -> None:
        super().set_extra_state(state)
        if not self.initialized and isinstance(state, dict):  # in version 1 an unset scale was 1
            self.reset_parameters()

    def _grid(self) -> tuple[int, ...]:
        return self.spec.quant_min, self.spec.quant_max

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), each [] or [C], without gradient."""
        zero_point = self.zero_point.detach().round()
        zero_point = zero_point.clamp(self.spec.quant_min, self.spec.quant_max)
        return positive(self.scale.detach()), zero_point.to(torch.int32)

    def has_range(self) -> bool:
        """Whether scale and zero point are valid; may read the scale on the host.

        Raises:
            RuntimeError: the scale is an average that began before the first batch.
        """
        if self.initialized or (self.scale > 0).all():
            return True
        if not (self.scale == UNSET).all():
            raise _average_error("scale", "one above 0", self.scale)
        return False

    def quantizes(self) -> bool:
        """Whether the last call quantized its input."""
        return self.fake_quant_enabled and self.initialized

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and offset from a batch."""
        values = x.detach().float()
        if self.ch_axis is None:
            rows = values.reshape(1, -1)
        else:
            rows = values.movedim(self.ch_axis, 0).flatten(1)
        low, high = rows.amin(1).clamp(max=0.0), rows.amax(1).clamp(min=0.0)
        usable = (low.isfinite() & high.isfinite()).view_as(self.scale)
        if self.spec.symmetric:
            # float64: the sum may overflow float32
            scale = 2 * rows.abs().mean(1, dtype=torch.float64) / math.sqrt(self.spec.quant_max)
            scale = scale.clamp(EPS, torch.finfo(torch.float32).max).float()
        else:
            scale, zero_point = choose_qparams(
                low, high, self.spec.quant_min, self.spec.quant_max, symmetric=False
            )
        self.scale.copy_(torch.where(usable, scale.view_as(self.scale), 1.0))
        if not self.spec.symmetric:
            offset = zero_point.view_as(self.zero_point).float()
            self.zero_point.copy_(torch.where(usable, offset, 0.0))
        self.initialized = True

    def forward(self, x: Tensor) -> Tensor:
        """``x`` fake-quantized; any shape, dtype kept. Unchanged before the first batch."""
        compiling = torch.compiler.is_compiling()
        if not self.initialized and not compiling:
            self.initialized = self.has_range()
        if self.training and not self.initialized and x.numel():
            self.initialize(x)
        if not self.fake_quant_enabled:
            return x
        if self.initialized:
            return self._quantized(x)
        if compiling:
            return torch.where((self.scale > 0).all(), self._quantized(x), x)
        if x.numel():
            _warn_float()
        return x

    def _quantized(self, x: Tensor) -> Tensor:
        if self.training and self.initialized:
            # .data: no version bump, as the same scale may quantize several inputs of a graph.
            self.scale.data.clamp_(min=EPS)
        sharing = x.numel() // max(1, self.scale.numel())
        return fake_quantize_lsq(
            x,
            self.scale,
            self.zero_point,
            self.spec.quant_min,
            self.spec.quant_max,
            self.ch_axis,
            grad_factor=1 / math.sqrt(max(1, sharing) * self.spec.quant_max),
        )

    def _quant_keys(self) -> set[str]:
        return {"_extra_state", "scale", "zero_point"}

    def extra_repr(self) -> str:
        return f"{self.spec}, ch_axis={self.ch_axis}"


def _warn_float() -> None:
    # One text from one line, so that Python shows it only once.
    warnings.warn(
        "a quantizer that has not seen a batch in training mode leaves its input in float (an "
        "average of weights that began before the first batch must include the buffers)",
        stacklevel=1,
    )


def _average_error(name: str, wanted: str, *values: Tensor) -> RuntimeError:
    """The error for a quantizer whose state is neither valid nor the initial one."""
    got = ", ".join(str(value.detach().flatten()[0].item()) for value in values)
    return RuntimeError(
        f"{name}: wanted {wanted}, got {got}: an average that began before the first batch. Begin "
        "it after the first batch (see divqat.quantize.observe_first), or copy buffers instead of "
        "averaging them"
    )


def activation_quantizer(spec: QuantSpec) -> FakeQuantize | LearnedStepFakeQuantize:
    """The quantizer of ``spec``, with one scale for the whole tensor."""
    return LearnedStepFakeQuantize(spec) if spec.learned else FakeQuantize(spec)
