"""The int8 scheme that is trained for."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option
from divqat.quantize.config import PRESETS


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings(Options):
    """Preset, widths, and when ranges and statistics stay fixed."""

    preset: str = option(
        "x86", "Runtime whose int8 scheme is trained for.", group="quantization", choices=PRESETS
    )
    weight_bits: int | None = option(
        None,
        "Bits of a weight. None: 7, with which no CPU saturates; 8 with preset tensorrt.",
        group="quantization", least=2, most=8,
    )  # fmt: skip
    activation_bits: int = option(
        8, "Bits of an activation.", group="quantization", least=2, most=8
    )
    first_last_bits: int = option(
        7, "Least bits of the first and the last layer's weights, where others have fewer than 7.",
        group="quantization", least=2, most=8,
    )  # fmt: skip
    ranges: str = option(
        "auto",
        "Activations of a batch are quantized with the range that includes it (exact) or the one "
        "before it (delayed); auto: exact, but delayed with several processes or parts.",
        group="quantization",
        choices=("auto", "exact", "delayed"),
    )
    freeze_observers_epoch: int | None = option(
        None,
        "Epoch (from 1) from which activation ranges stay fixed; beyond the last: never. "
        "None: the last third of the epochs.",
        group="quantization",
        least=2,
    )
    freeze_batchnorm_epoch: int | None = option(
        None, "Epoch from which BatchNorm statistics stay fixed; as above, but the last one with "
        "misdirect and in kd-qat.",
        group="quantization", least=1,
    )  # fmt: skip
