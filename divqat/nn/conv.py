"""Convolutions with quantized weight and input."""

from __future__ import annotations

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
    fake-quantized. The weight is [C_in, C_out / groups, kH, kW]: channels lie along axis 1.

    Args: those of ``nn.ConvTranspose2d``, and those of :class:`QuantLayer`.
    """

    WEIGHT_AXIS = 1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[N, C_in, H, W] → [N, C_out, H', W']."""
        return F.conv_transpose2d(
            x,
            weight,
            bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.output_padding,
            self.groups,
            self.dilation,
        )

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As ``nn.ConvTranspose2d``, less its ``output_size``: [N, C_in, H, W] → [N, C_out, …]."""
        if output_size is not None:
            raise ValueError("output_size: wanted None (use output_padding), got a size")
        return super().forward(input)
