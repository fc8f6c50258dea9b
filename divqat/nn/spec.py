"""The quantization of one tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The integer grid of one tensor, and how its scale is found.

    Attributes:
        bits: width of a code, 2 to 8.
        signed: codes are −2^(bits−1) … 2^(bits−1) − 1, else 0 … 2^bits − 1.
        symmetric: the zero point is fixed at 0 (the middle code if unsigned); else affine.
        per_channel: one scale per output channel (weights) instead of one per tensor.
        narrow_range: drop the lowest code, so that a signed grid is symmetric about 0.
        averaging_constant: weight of a new batch in the moving average of min and max.
        learned: the scale is learned (LSQ) instead of observed.

    Raises:
        ValueError: ``bits`` or ``averaging_constant`` is out of range.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    per_channel: bool = False
    narrow_range: bool = False
    averaging_constant: float = 0.01
    learned: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: wanted 2 to 8, got {self.bits}")
        if not 0 < self.averaging_constant <= 1:
            raise ValueError(
                f"averaging_constant: wanted a value in (0, 1], got {self.averaging_constant}"
            )

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        return (-(2 ** (self.bits - 1)) if self.signed else 0) + self.narrow_range

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "affine"
        granularity = "per channel" if self.per_channel else "per tensor"
        learned = ", learned" if self.learned else ""
        return f"{'' if self.signed else 'u'}int{self.bits} {kind}, {granularity}{learned}"


# int8 weights with a scale per output channel, which every runtime supports. They have 7 bits, up
# to ±63: CPUs without VNNI add two products with uint8 activations in 16 bits, and 2 · 255 · 63
# fits.
WEIGHT = QuantSpec(bits=7, per_channel=True, narrow_range=True)
# uint8 affine activations.
ACTIVATION = QuantSpec(signed=False, symmetric=False)
