"""A linear layer with quantized weight and input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from divqat.nn._layer import QuantLayer


class QuantLinear(QuantLayer, nn.Linear):
    """``nn.Linear`` whose weight, and input unless ``input_spec=None``, are fake-quantized.

    Args: those of ``nn.Linear``, and those of :class:`QuantLayer`.
    """

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return F.linear(x, weight, bias)
