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
        first_last_bits: width of the first and the last layer's weights and of the network's
            input, which carry most of the error at low widths; None treats them as the rest. The
            order is that of the calls, or of registration in a model that cannot be traced.
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
    first_last_bits: int | None = 8
    skip: tuple[str, ...] = ()
    mode: str = "exact"
    inplace: bool = True

    def skips(self, name: str) -> bool:
        """Whether the module of this name stays in float."""
        return any(name == skipped or name.startswith(skipped + ".") for skipped in self.skip)

    def edge(self, spec: QuantSpec) -> QuantSpec:
        """``spec`` for the first or last layer."""
        return spec if self.first_last_bits is None else replace(spec, bits=self.first_last_bits)


def preset(name: str, *, weight_bits: int = 8, activation_bits: int = 8) -> QuantConfig:
    """A configuration for a runtime.

    * ``"x86"`` (ONNX Runtime, OpenVINO): uint8 affine activations, int8 weights with a scale per
      channel. CPUs without VNNI saturate when they add products of 8-bit weights and activations:
      there, turn on ONNX Runtime's ``session.x64quantprecision``, or use ``weight_bits=7``.
    * ``"tensorrt"``: symmetric int8 activations with zero point 0, weights as above.
    * ``"qnnpack"``: uint8 affine activations, int8 weights with one scale per tensor.

    Below 7 bits the first and the last layer keep 8 (``first_last_bits``).

    Raises:
        ValueError: an unknown name, or a width outside 2 to 8.
    """
    weight = replace(WEIGHT, bits=weight_bits)
    activation = replace(ACTIVATION, bits=activation_bits)
    # Seven bits are asked for because of the hardware: then they hold for every layer.
    edge = 8 if min(weight_bits, activation_bits) < 7 else None
    if name == "x86":
        return QuantConfig(weight=weight, activation=activation, first_last_bits=edge)
    if name == "tensorrt":
        symmetric = QuantSpec(bits=activation_bits)
        return QuantConfig(weight=weight, activation=symmetric, first_last_bits=edge)
    if name == "qnnpack":
        weight = replace(weight, per_channel=False)
        return QuantConfig(weight=weight, activation=activation, first_last_bits=edge)
    raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {name!r}")
