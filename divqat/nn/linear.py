"""A linear layer with quantized weight and input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from divqat.nn._layer import QuantLayer
from divqat.nn.spec import ACTIVATION, WEIGHT, QuantSpec


class QuantLinear(QuantLayer, nn.Linear):
    """``nn.Linear`` whose weight, and input unless ``input_spec=None``, are fake-quantized.

    Args:
        *args, **kwargs: those of ``nn.Linear``.
        weight_spec: the weight's grid; signed and symmetric.
        input_spec: the input's grid, or None where the input is quantized elsewhere.
    """

    def __init__(
        self,
        *args: Any,
        weight_spec: QuantSpec = WEIGHT,
        input_spec: QuantSpec | None = ACTIVATION,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_quant(weight_spec, input_spec)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return F.linear(x, weight, bias)
