"""Observers of the range of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from divqat.nn._state import QuantizerState
from divqat.nn.spec import ACTIVATION, QuantSpec
from divqat.ops import fake_quantize_observed
from divqat.ops._library import op


def qparam_shape(ch_axis: int | None, num_channels: int | None) -> list[int]:
    """The shape of a scale: [] per tensor, [num_channels] per channel."""
    if (ch_axis is None) != (num_channels is None):
        raise ValueError(
            f"ch_axis, num_channels: wanted both or neither, got {ch_axis} and {num_channels}"
        )
    return [] if num_channels is None else [num_channels]


class MovingAverageMinMaxObserver(QuantizerState):
    """Moving average of min and max, per tensor or per channel; passes its input through.

    Buffers: ``running_min``, ``running_max``, ``scale`` (float32) and ``zero_point`` (int32), each
    [] or [C]. Until the first batch the range is empty (+Inf, −Inf). Scale and zero point follow
    from the range, even if the range comes from an observer with another grid, is an average, or
    was set by hand.

    When ``torch.utils.checkpoint`` recomputes the forward, the input is not observed again; the
    scale is that of the first run, unless another batch was observed in between. A compiled forward
    cannot detect the recomputation: apply ``torch.compile`` outside the checkpoint.

    Args:
        spec: the grid; ``spec.averaging_constant`` is the weight of a new batch (Jacob et al.
            2018, §3.1).
        ch_axis: the channel axis; None: one range for the whole tensor.
        num_channels: C, needed with ``ch_axis``.

    Raises:
        ValueError: only one of ``ch_axis`` and ``num_channels`` is given.
    """

    SWITCHES: tuple[str, ...] = ("observer_enabled",)
    running_min: Tensor
    running_max: Tensor
    scale: Tensor
    zero_point: Tensor

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
        self.observer_enabled = True
        self.register_buffer("running_min", torch.full(shape, float("inf")))
        self.register_buffer("running_max", torch.full(shape, float("-inf")))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the range."""
        self.running_min.fill_(float("inf"))
        self.running_max.fill_(float("-inf"))
        self.scale.fill_(1)
        self.zero_point.fill_(0)

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), each [] or [C], of the current range."""
        # A batch of just the two ends changes neither; that of an empty range is ignored.
        ends = torch.stack([self.running_min, self.running_max])
        spec, axis = self.spec, None if self.ch_axis is None else 1
        buffers = self.running_min, self.running_max, self.scale, self.zero_point
        grid = spec.quant_min, spec.quant_max, axis, 1.0, spec.symmetric
        op("observe")(ends, *buffers, *grid, False)
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` in training mode; return it unchanged."""
        return self._observed(x, fake_quant=False)

    def _observes(self) -> bool:
        return self.training and self.observer_enabled

    def _observed(self, x: Tensor, **options: object) -> Tensor:
        return fake_quantize_observed(
            x,
            self.running_min,
            self.running_max,
            self.scale,
            self.zero_point,
            self.spec.quant_min,
            self.spec.quant_max,
            self.ch_axis,
            averaging_constant=self.spec.averaging_constant,
            symmetric=self.spec.symmetric,
            observe=self._observes(),
            **options,  # type: ignore[arg-type]
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if args[2].get("assign_to_params_buffers"):  # do not write to the checkpoint's tensors
            self.scale, self.zero_point = self.scale.clone(), self.zero_point.clone()
        self.calculate_qparams()

    def _quant_keys(self) -> set[str]:
        return {"_extra_state", "running_min", "running_max", "scale", "zero_point"}

    def extra_repr(self) -> str:
        return f"{self.spec}, ch_axis={self.ch_axis}"
