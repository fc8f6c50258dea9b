"""What a model is quantized to, and presets for the runtimes that people deploy on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from divqat.nn.spec import ACTIVATION, WEIGHT, QuantSpec

PRESETS = ("x86", "tensorrt", "qnnpack")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How :func:`divqat.prepare` quantizes a model.

    Attributes:
        weight: the grid of every weight.
        activation: the grid of every activation.
        first_last_bits: width of the first and the last layer's weights, which carry most of the
            error at low widths; None treats them as the rest. The order is that of the calls, or
            of registration in a model that cannot be traced.
        input_bits: width of the network's input, likewise.
        skip: names of modules, as in ``named_modules()``, that stay in float, layers and other
            operations; a name covers what is below it. What they return is still quantized where
            another operation wants it so.
        mode: how activations are observed, ``"exact"`` or ``"delayed"``; see
            :func:`divqat.ops.fake_quantize_observed`. ``torch.utils.checkpoint`` wants
            ``"exact"``.
        inplace: quantize over the output of a BatchNorm (fused or not) that nothing else in the
            graph reads: less memory and time, the same bits. What looks at that output from
            outside, a hook of the BatchNorm that keeps it or ``torch.utils.checkpoint`` around
            nothing but what follows it, finds the quantized values: give False.
    """

    weight: QuantSpec = WEIGHT
    activation: QuantSpec = ACTIVATION
    first_last_bits: int | None = 7
    input_bits: int | None = 8
    skip: tuple[str, ...] = ()
    mode: str = "exact"
    inplace: bool = True

    def skips(self, name: str) -> bool:
        """Whether the module of this name stays in float."""
        return any(name == skipped or name.startswith(skipped + ".") for skipped in self.skip)

    def edge(self) -> QuantSpec:
        """The grid of the first and the last layer's weights."""
        return _as_wide(self.weight, self.first_last_bits)

    def input(self) -> QuantSpec:
        """The grid of the network's input."""
        return _as_wide(self.activation, self.input_bits)


def _as_wide(spec: QuantSpec, bits: int | None) -> QuantSpec:
    return spec if bits is None else replace(spec, bits=bits)


def default_weight_bits(name: str) -> int:
    """How many bits a weight of a preset has where none are asked for: on a CPU so many that no
    sum of its products saturates, which a GPU does not do."""
    return 8 if name == "tensorrt" else WEIGHT.bits


def narrow(weight_bits: int, activation_bits: int) -> bool:
    """Whether the ends of a network need more. Seven bits are asked for because of the hardware:
    then they hold for every layer."""
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
      channel, stored as int8. With 8 bits, CPUs without VNNI saturate when they add products of
      weights and activations, unless ONNX Runtime's ``session.x64quantprecision`` is turned on.
    * ``"tensorrt"``: symmetric int8 activations with zero point 0, 8-bit weights with a scale per
      channel; biases stay in float.
    * ``"qnnpack"``: uint8 affine activations, 7-bit weights with one scale per tensor.

    Below 7 bits the network's input keeps 8, and the first and the last layer's weights
    ``first_last_bits``, if others do not have more.

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
    few = narrow(bits, activation_bits)
    return QuantConfig(
        weight=weight,
        activation=activation,
        first_last_bits=max(bits, first_last_bits) if few else None,
        input_bits=8 if few else None,
    )
