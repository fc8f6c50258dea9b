"""Convolutions with quantized weight and input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from divqat.nn._layer import QuantLayer


class QuantConv2d(QuantLayer, nn.Conv2d):
    """``nn.Conv2d`` whose weight, and input unless ``input_spec=None``, are fake-quantized.

    Args: those of ``nn.Conv2d``, and those of :class:`QuantLayer`.
    """

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[N, C_in, H, W] → [N, C_out, H', W']."""
        return self._conv_forward(x, weight, bias)


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose weight, and input unless ``input_spec=None``, are
    fake-quantized. The weight is [C_in, C_out / groups, kH, kW]: the channel axis is 1.

    Args: those of ``nn.ConvTranspose2d``, and those of :class:`QuantLayer`.
    """

    WEIGHT_AXIS = 1

    def compute(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        """[N, C_in, H, W] → [N, C_out, H', W']."""
        stride, padding, dilation = self.stride, self.padding, self.dilation
        sizes: Any = (output_size, stride, padding, self.kernel_size, 2, dilation)
        extra = self._output_padding(x, *sizes)
        return F.conv_transpose2d(x, weight, bias, stride, padding, extra, self.groups, dilation)  # type: ignore[arg-type]
