"""A product whose weight is an argument of the call: F.conv2d, F.linear, matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from divqat.nn._layer import QuantLayer
from divqat.nn.spec import WEIGHT, QuantSpec


class QuantFunction(QuantLayer, nn.Module):
    """A function of input, weight and bias whose weight is fake-quantized.

    The weight may be a parameter or be computed from parameters (standardized, sliced, scaled), and
    stays where the model has it.

    Args:
        function: (input, weight, bias, **options) → output.
        shape: of the weight.
        channel_axis: that of the weight's output channels.
        weight_spec: see :class:`QuantLayer`.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        function: Callable[..., Tensor],
        shape: torch.Size,
        channel_axis: int,
        *,
        weight_spec: QuantSpec = WEIGHT,
    ) -> None:
        self.function, self.shape, self.channel_axis = function, shape, channel_axis
        super().__init__(weight_spec=weight_spec, input_spec=None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias", "function", "shape", "channel_axis"):
            # weight and bias are those of one call: not parameters, even if they are the model's
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _weight_axis(self) -> int | None:
        return self.channel_axis if self.weight_spec.per_channel else None

    def set_weight_spec(self, weight_spec: QuantSpec) -> None:
        self.weight, self.bias = torch.empty(self.shape, device="meta"), None
        super().set_weight_spec(weight_spec)
        self.weight = None

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """As the base; an override, so that ``group_weights`` leaves this layer alone: before its
        call there is no weight."""
        return super().quantize_weight(weight)

    @property
    def weight_numel(self) -> int:
        """The number of weights."""
        return self.shape.numel()

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kw: Any) -> Any:
        """The function itself."""
        return self.function(x, weight, bias, *args, **kw)

    def forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The function of ``input``, the fake-quantized ``weight`` and ``bias``."""
        self.weight, self.bias = weight, bias
        try:
            return self.compute(
                input, self.quantized_weight()[0], self.deployed_bias(bias), **options
            )
        finally:
            self.weight = self.bias = None

    def extra_repr(self) -> str:
        return f"{self.function.__name__}, weight={self.weight_spec}"


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] and [K, C] → [..., C]."""
    product = x @ weight
    return product if bias is None else product + bias
