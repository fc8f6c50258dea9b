"""The base of the quantized layers: a quantized weight and, optionally, a quantized input."""

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

# Deployed weights of fewer bits are spread over this many: with eight, sums of two products could
# saturate on CPUs without VNNI.
SPREAD_BITS = 7


class QuantLayer(QuantState):
    """Mixin before ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear``.

    In eval mode the bias is rounded as for an integer kernel, to a multiple of input scale · weight
    scale. With few bits both scales are coarse, so codes of fewer than 7 bits are deployed as
    multiples of 2^(7 − bits), on a scale that is finer by this factor: the same weights, and finer
    biases. The bias stays in float if the scale of the input is not known
    (``divqat.quantize.link_inputs``), and with symmetric int8 activations: TensorRT has no
    DequantizeLinear for int32.

    Args:
        *args, **kwargs: those of the layer.
        weight_spec: the weight's grid; signed and symmetric.
        input_spec: the input's grid; None: the input is quantized elsewhere.

    Raises:
        ValueError: ``weight_spec`` is not signed and symmetric.
    """

    WEIGHT_AXIS = 0  # axis of the weight's output channels
    weight: Any  # nn.Parameter, declared by the base class that follows
    bias: Any
    # State of one forward under group_weights; class attributes as well, so that models that were
    # pickled without them load.
    _group: Callable[[], None] | None = None  # quantizes the weights of this layer's bucket
    _grouped_weight: tuple[Tensor, Tensor | None] | None = None  # its result for quantized_weight
    weight_quant_enabled = True  # False: weight and bias stay in float, as in the replaced layer
    # The quantizer of the input, if not in this layer; in a tuple, so that it is not a submodule.
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
        """Set the grid of the weight."""
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
    def weight_numel(self) -> int:
        """The number of weights."""
        return int(self.weight.numel())

    @property
    def _weight_axis(self) -> int | None:
        return self.WEIGHT_AXIS if self.weight_spec.per_channel else None

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The layer's float operation with the given weight, bias and further arguments of the
        call."""
        raise NotImplementedError

    def quantize_input(self, x: Tensor) -> Tensor:
        """``x`` after the layer's own input quantizer, if it has one."""
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
        """The tensor that is quantized with an observed scale, and its factor over the weight."""
        return self.weight, None

    def quantized_weight(self) -> tuple[Tensor, Tensor | None]:
        """The quantized :meth:`scaled_weight` and its factor, from the bucket if there is one.

        The result of a bucket serves one call: before a second call BatchNorm may have changed.
        """
        if not self.weight_quant_enabled:
            return self.scaled_weight()
        if self._group is not None:
            self._group()
        grouped = self._grouped_weight
        if grouped is not None:
            self._grouped_weight = None
            return grouped
        weight, factor = self.scaled_weight()
        return self.quantize_weight(weight), factor

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The float weight and bias of the deployed layer."""
        return self.weight, self.bias

    @torch.no_grad()
    def weight_qparams(self) -> Tensor:
        """The weight's scale, float32 [] or [C]; its zero point is 0."""
        if self.weight_fake_quantize is not None:
            return self.weight_fake_quantize.calculate_qparams()[0]
        return weight_scale(self.folded()[0], *self.weight_grid())

    @property
    def input_quantizer(self) -> FakeQuantize | LearnedStepFakeQuantize | None:
        """The quantizer of the input; None if it is unknown."""
        quantizer = self.input_fake_quantize
        return quantizer if quantizer is not None else next(iter(self._source), None)

    def input_scale(self) -> Tensor | None:
        """The scale of the input, float32 []; None if the bias stays in float."""
        quantizer = self.input_quantizer
        if quantizer is None or (quantizer.spec.signed and quantizer.spec.symmetric):
            return None
        return quantizer.calculate_qparams()[0]

    @property
    def spread(self) -> int:
        """The power of two of which deployed codes are multiples."""
        return 2 ** max(0, SPREAD_BITS - self.weight_spec.bits)

    @torch.no_grad()
    def deployed_scales(
        self, bias: Tensor | None, input_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The scales of the deployed weight, float32 [] or [C], and bias, [C_out] or None.

        Args:
            bias: the deployed bias in float.
            input_scale: see :meth:`input_scale`.
        """
        spread = self.spread
        scale = self.weight_qparams()
        if bias is None or input_scale is None:
            return scale / spread, None
        # The scale of an almost empty channel is so small that its bias would not fit into int32.
        needed = bias.abs() / (input_scale * (2.0**30 / spread))
        # In a transposed convolution one weight scale serves one channel of every group.
        needed = needed.view(-1, scale.numel()).amax(0).view_as(scale)
        scale = torch.maximum(scale, needed) / spread  # spread is a power of two: exact
        return scale, (input_scale * scale).flatten().repeat(len(bias) // scale.numel())

    def deployed_bias(self, bias: Tensor | None) -> Tensor | None:
        """``bias``, in eval mode rounded as for an integer kernel; the gradient passes straight
        through."""
        quantizer = self.input_quantizer
        if self.training or bias is None or not self.weight_quant_enabled:
            return bias
        if quantizer is None or not quantizer.quantizes():
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
