"""The quantization settings of a model, and presets for common runtimes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from divqat.nn.spec import ACTIVATION, WEIGHT, QuantSpec

PRESETS = ("x86", "tensorrt", "qnnpack")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How :func:`divqat.prepare` quantizes a model.

    Attributes:
        weight: the grid of every weight.
        activation: the grid of every activation.
        first_last_bits: bits of the first and the last layer's weights, which cause most of the
            error at low widths; None: the same as for the other layers. The order is that of the
            calls, or of registration in a model that cannot be traced.
        layer_bits: bits of single layers' weights, by their names in ``named_modules()``; they come
            before all other settings. :func:`divqat.mixed_precision` chooses them.
        input_bits: bits of the network's input; None: the same as for other activations.
        skip: names of modules, as in ``named_modules()``, whose layers and other operations stay in
            float, including their submodules. Their outputs are still quantized where a quantized
            operation reads them.
        mode: how activations are observed, ``"exact"`` or ``"delayed"``; see
            :func:`divqat.ops.fake_quantize_observed`. ``torch.utils.checkpoint`` needs
            ``"exact"``.
        inplace: quantize the output of a BatchNorm (fused or not) in place if nothing else in the
            graph reads it: less memory and time, the same bits. Code outside the graph that keeps
            this output sees quantized values, such as a hook of the BatchNorm, or
            ``torch.utils.checkpoint`` around only the operations after it. Use False for them.
        rectify_output: quantize the model's output, too, with 0 for all values below
            (:class:`divqat.nn.RectifiedOutput`): for a model trained to reject foreign images.

    Raises:
        ValueError: ``layer_bits`` has a width outside 2 to 8.
    """

    weight: QuantSpec = WEIGHT
    activation: QuantSpec = ACTIVATION
    first_last_bits: int | None = 7
    input_bits: int | None = 8
    skip: tuple[str, ...] = ()
    mode: str = "exact"
    inplace: bool = True
    rectify_output: bool = False
    layer_bits: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, bits in self.layer_bits.items():
            if type(bits) is not int or not 2 <= bits <= 8:
                raise ValueError(f"layer_bits: wanted 2 to 8 bits for {name!r}, got {bits!r}")

    def skips(self, name: str) -> bool:
        """Whether the module of this name stays in float."""
        return any(name == skipped or name.startswith(skipped + ".") for skipped in self.skip)

    def edge(self) -> QuantSpec:
        """The grid of the first and the last layer's weights."""
        return _with_bits(self.weight, self.first_last_bits)

    def layer(self, names: Iterable[str], edge: bool) -> QuantSpec:
        """The grid of a layer's weight.

        Args:
            names: all names of the layer.
            edge: whether it is the first or the last layer.
        """
        given = (self.layer_bits[name] for name in names if name in self.layer_bits)
        return _with_bits(self.edge() if edge else self.weight, next(given, None))

    def input(self) -> QuantSpec:
        """The grid of the network's input."""
        return _with_bits(self.activation, self.input_bits)


def _with_bits(spec: QuantSpec, bits: int | None) -> QuantSpec:
    return spec if bits is None else replace(spec, bits=bits)


def default_weight_bits(name: str) -> int:
    """The default bits of a preset's weights: on a CPU, few enough that no sum of products
    saturates; a GPU does not saturate."""
    return 8 if name == "tensorrt" else WEIGHT.bits


def narrow(weight_bits: int, activation_bits: int) -> bool:
    """Whether the widths are so low that the ends of a network need more bits. Seven bits are a
    matter of hardware, not of accuracy, and hold for every layer."""
    return min(weight_bits, activation_bits) < 7


def preset(
    name: str,
    *,
    weight_bits: int | None = None,
    activation_bits: int = 8,
    first_last_bits: int = WEIGHT.bits,
) -> QuantConfig:
    """A configuration for a runtime.

    * ``"x86"`` (ONNX Runtime, OpenVINO): uint8 affine activations, 7-bit weights with a scale per
      channel, stored as int8. With 8-bit weights, sums of products can saturate on CPUs without
      VNNI, unless ONNX Runtime's ``session.x64quantprecision`` is on.
    * ``"tensorrt"``: symmetric int8 activations with zero point 0, 8-bit weights with a scale per
      channel; biases stay in float.
    * ``"qnnpack"``: uint8 affine activations, 7-bit weights with one scale per tensor.

    If weights or activations have fewer than 7 bits, the network's input keeps 8, and the weights
    of the first and the last layer have at least ``first_last_bits``.

    Args:
        name: one of the above.
        weight_bits: 2 to 8; None: the preset's default.
        activation_bits: 2 to 8.
        first_last_bits: 2 to 8.

    Raises:
        ValueError: an unknown name, or a width outside 2 to 8.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {name!r}")
    bits = default_weight_bits(name) if weight_bits is None else weight_bits
    weight = replace(WEIGHT, bits=bits, per_channel=name != "qnnpack")
    activation = replace(ACTIVATION, bits=activation_bits)
    if name == "tensorrt":
        activation = QuantSpec(bits=activation_bits)
    low = narrow(bits, activation_bits)
    return QuantConfig(
        weight=weight,
        activation=activation,
        first_last_bits=max(bits, first_last_bits) if low else None,
        input_bits=8 if low else None,
    )
