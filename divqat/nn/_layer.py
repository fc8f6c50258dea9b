"""What the quantized layers share: a quantized weight and, if asked, a quantized input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from divqat.nn._state import QuantState
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize, activation_quantizer
from divqat.nn.spec import ACTIVATION, WEIGHT, QuantSpec
from divqat.ops import fake_quantize_weights
from divqat.ops.reference import weight_scale

# Deployed weights of fewer bits are spread over so many: over eight, sums of two products could
# saturate on CPUs without VNNI.
SPREAD_BITS = 7


class QuantLayer(QuantState):
    """Mixin before ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear``.

    In eval mode the bias is what an integer kernel adds: a multiple of input scale · weight scale.
    Both are coarse where bits are few, so codes of fewer than 7 bits are deployed as multiples of
    2^(7 − bits), on a scale as much finer: the same weights, and finer biases. The bias stays in
    float where the scale of the input is not known (``divqat.quantize.link_inputs``)
    and on symmetric int8 activations, TensorRT's: it takes no int32 through DequantizeLinear.

    Args:
        *args, **kwargs: those of the layer.
        weight_spec: the weight's grid; signed and symmetric.
        input_spec: the input's grid, or None where the input is quantized elsewhere.
    """

    WEIGHT_AXIS = 0  # the output channels of the weight
    weight: Any  # nn.Parameter, declared by the base class that follows
    bias: Any
    # The two of a forward that group_weights has opened; class attributes as well, so that models
    # pickled without them load.
    _group: Callable[[], None] | None = None  # hands this layer and its neighbours their weights
    _handed: tuple[Tensor, Tensor | None] | None = None  # as quantized_weight returns it
    # Where the input was quantized, if not here; in a tuple, so that it is no submodule.
    _source: tuple[FakeQuantize | LearnedStepFakeQuantize, ...] = ()

    def __init__(
        self,
        *args: Any,
        weight_spec: QuantSpec = WEIGHT,
        input_spec: QuantSpec | None = ACTIVATION,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.input_fake_quantize = None if input_spec is None else activation_quantizer(input_spec)
        self.set_weight_spec(weight_spec)

    def set_weight_spec(self, weight_spec: QuantSpec) -> None:
        """Quantize the weight on another grid from now on."""
        if not weight_spec.symmetric or not weight_spec.signed:
            raise ValueError(f"weight_spec: wanted a signed symmetric grid, got {weight_spec}")
        self.weight_spec = weight_spec
        self.weight_fake_quantize = None
        if weight_spec.learned:
            axis = self._weight_axis
            channels = None if axis is None else self.weight.shape[axis]
            self.weight_fake_quantize = LearnedStepFakeQuantize(
                weight_spec, ch_axis=axis, num_channels=channels
            )

    @property
    def _weight_axis(self) -> int | None:
        return self.WEIGHT_AXIS if self.weight_spec.per_channel else None

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The layer's own operation with the given weight and bias, and what else it is called
        with."""
        raise NotImplementedError

    def quantize_input(self, x: Tensor) -> Tensor:
        """``x`` through the layer's own input quantizer, if it has one."""
        return x if self.input_fake_quantize is None else self.input_fake_quantize(x)

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """``weight`` fake-quantized by the layer's spec; same shape and dtype."""
        if self.weight_fake_quantize is not None:
            return self.weight_fake_quantize(weight)
        return fake_quantize_weights([weight], *self.weight_grid())[0]

    def weight_grid(self) -> tuple[int, int, int | None]:
        """``quant_min``, ``quant_max`` and ``ch_axis`` of the weight."""
        return self.weight_spec.quant_min, self.weight_spec.quant_max, self._weight_axis

    def scaled_weight(self) -> tuple[Tensor, Tensor | None]:
        """The tensor that an observed grid is laid over, and the factor of the weight in it."""
        return self.weight, None

    def quantized_weight(self) -> tuple[Tensor, Tensor | None]:
        """The quantized :meth:`scaled_weight` and its factor, quantized in a group if there is one.

        What a group computed serves one call: a second may find another state of its BatchNorm.
        """
        if self._group is not None:
            self._group()
        handed = self._handed
        if handed is not None:
            self._handed = None
            return handed
        weight, factor = self.scaled_weight()
        return self.quantize_weight(weight), factor

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in float as they are deployed."""
        return self.weight, self.bias

    @torch.no_grad()
    def weight_qparams(self) -> Tensor:
        """The weight's scale, float32 [] or [C]; its zero point is 0."""
        if self.weight_fake_quantize is not None:
            return self.weight_fake_quantize.calculate_qparams()[0]
        return weight_scale(self.folded()[0], *self.weight_grid())

    @property
    def input_quantizer(self) -> FakeQuantize | LearnedStepFakeQuantize | None:
        """What puts the input on its grid, where that is known."""
        own = self.input_fake_quantize
        return own if own is not None else next(iter(self._source), None)

    def input_scale(self) -> Tensor | None:
        """The scale of the input, float32 [], on which the bias becomes integer; None: it does
        not."""
        quantizer = self.input_quantizer
        if quantizer is None or (quantizer.spec.signed and quantizer.spec.symmetric):
            return None
        return quantizer.calculate_qparams()[0]

    @property
    def spread(self) -> int:
        """The power of two that deployed codes are multiples of."""
        return 2 ** max(0, SPREAD_BITS - self.weight_spec.bits)

    @torch.no_grad()
    def deployed_scales(
        self, bias: Tensor | None, input_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The scales of the deployed weight, float32 [] or [C], and bias, [C_out] or None.

        Args:
            bias: the deployed bias in float. input_scale: see :meth:`input_scale`.
        """
        spread = self.spread
        scale = self.weight_qparams()
        if bias is None or input_scale is None:
            return scale / spread, None
        # An all but empty channel has so small a scale that its bias would not fit.
        needed = bias.abs() / (input_scale * (2.0**30 / spread))
        # One weight scale serves a channel of every group of a transposed convolution.
        needed = needed.view(-1, scale.numel()).amax(0).view_as(scale)
        scale = torch.maximum(scale, needed) / spread  # a power of two: no weight changes by a bit
        return scale, (input_scale * scale).flatten().repeat(len(bias) // scale.numel())

    def deployed_bias(self, bias: Tensor | None) -> Tensor | None:
        """``bias`` in eval mode, as an integer kernel adds it; its gradient is passed through."""
        quantizer = self.input_quantizer
        if self.training or bias is None or quantizer is None or not quantizer.quantizes():
            return bias
        _, scale = self.deployed_scales(bias, self.input_scale())
        if scale is None:
            return bias
        return bias + ((bias / scale).round() * scale - bias).to(bias.dtype).detach()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The operation of the replaced module on the quantized input and weight."""
        x = self.quantize_input(input)
        bias = self.deployed_bias(self.bias)
        return self.compute(x, self.quantized_weight()[0], bias, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight_spec}"
