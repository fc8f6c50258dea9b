"""The modules of a converted model: integer weights, fixed scales, the deployed arithmetic.

In eager mode they compute in float with the dequantized integers. During ``torch.onnx.export`` they
emit the QuantizeLinear and DequantizeLinear nodes that a runtime turns into int8 kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from divqat.nn._layer import QuantLayer
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.nn.spec import QuantSpec
from divqat.ops import fake_quantize
from divqat.ops.reference import along

# Q/DQ nodes of int8 and float32, per axis and per tensor, which every runtime supports.
_OPSET = 18


class QuantizeDequantize(nn.Module):
    """An activation on its grid, with fixed scale and zero point, after ReLU if it was fused.

    Buffers: ``scale`` float32 [], ``zero_point`` int8 or uint8 [].
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: FakeQuantize | LearnedStepFakeQuantize) -> None:
        super().__init__()
        self.spec: QuantSpec = quantizer.spec
        self.relu = quantizer.relu
        scale, zero_point = quantizer.calculate_qparams()
        self.register_buffer("scale", scale.clone())
        self.register_buffer(
            "zero_point", zero_point.to(torch.int8 if self.spec.signed else torch.uint8)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` quantized and dequantized; same shape and dtype."""
        spec = self.spec
        x = x.relu() if self.relu else x
        if not torch.onnx.is_in_onnx_export():
            zero_point = self.zero_point.int()
            return fake_quantize(x, self.scale, zero_point, spec.quant_min, spec.quant_max)
        symbolic, dtype = torch.onnx.ops.symbolic, self.zero_point.dtype
        q = symbolic(
            "QuantizeLinear",
            (x, self.scale, self.zero_point),
            dtype=dtype,
            shape=x.shape,
            version=_OPSET,
        )
        if (spec.quant_min, spec.quant_max) != (torch.iinfo(dtype).min, torch.iinfo(dtype).max):
            # QuantizeLinear has only 8-bit ranges: a narrower grid needs a clip of the codes.
            low = torch.tensor(spec.quant_min, dtype=dtype)
            high = torch.tensor(spec.quant_max, dtype=dtype)
            q = symbolic("Clip", (q, low, high), dtype=dtype, shape=x.shape, version=_OPSET)
        return _dequantize(q, self.scale, self.zero_point, None)


class IntegerLayer(nn.Module):
    """A convolution or linear layer with integer weight and bias.

    Buffers: ``weight`` int8, ``weight_scale`` float32 [C] or []; ``bias`` int32 [C] on the scale
    input_scale · weight_scale of integer accumulators, or float32: see :class:`QuantLayer`.

    Args:
        layer: the trained layer.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    bias_scale: Tensor | None
    bias_zero_point: Tensor | None

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.axis = layer._weight_axis
        with torch.no_grad():
            weight, bias = layer.folded()
            scale, bias_scale = layer.deployed_scales(bias, layer.input_scale())
            spec, spread = layer.weight_spec, layer.spread
            codes = torch.round(weight * along(scale * spread, weight, self.axis).reciprocal())
            codes = spread * codes.clamp(spec.quant_min, spec.quant_max)
            self.register_buffer("weight", codes.to(torch.int8))
            self.register_buffer("weight_scale", scale)
            self.register_buffer("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
            if bias is not None and bias_scale is not None:
                bias = torch.round(bias / bias_scale).to(torch.int32)
            self.register_buffer("bias", None if bias is None else bias.detach().clone())
            self.register_buffer("bias_scale", bias_scale)
            zero_point = None
            if bias_scale is not None:
                zero_point = torch.zeros_like(bias_scale, dtype=torch.int32)
            self.register_buffer("bias_zero_point", zero_point)
        self.input = (
            nn.Identity()
            if layer.input_fake_quantize is None
            else QuantizeDequantize(layer.input_fake_quantize)
        )
        # Only the layer's operation and its hyperparameters remain.
        layer.weight = layer.bias = layer.input_fake_quantize = layer.weight_fake_quantize = None
        if hasattr(layer, "bn"):
            del layer.bn
        self.layer = layer

    @staticmethod
    def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return _dequantize(codes, scale, zero_point, axis)
        return codes.float() * along(scale, codes, axis)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize ``input``, then apply the layer's operation."""
        x = self.input(input)
        weight = self._dequantized(
            self.weight, self.weight_scale, self.weight_zero_point, self.axis
        )
        bias = self.bias
        if bias is not None and self.bias_scale is not None:
            assert self.bias_zero_point is not None
            bias = self._dequantized(bias, self.bias_scale, self.bias_zero_point, 0)
        return self.layer.compute(x, weight, bias, *args, **kwargs)


def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """A DequantizeLinear node."""
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (q, scale, zero_point),
        attrs={} if axis is None else {"axis": axis},
        dtype=torch.float32,
        shape=q.shape,
        version=_OPSET,
    )
