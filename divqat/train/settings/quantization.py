"""Settings of quantization."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option
from divqat.quantize.clip import ACTIVATION_RANGES, WEIGHT_RANGES
from divqat.quantize.config import PRESETS
from divqat.quantize.ptq import ROUNDINGS


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings(Options):
    """Preset, bit widths, and when ranges and BatchNorm statistics freeze."""

    preset: str = option(
        "x86", "Target runtime, which sets the int8 scheme.", group="quantization", choices=PRESETS
    )
    weight_bits: int | None = option(
        None,
        "Bits of a weight. None: 7, with which no CPU saturates, or 8 with preset tensorrt.",
        group="quantization", least=2, most=8,
    )  # fmt: skip
    activation_bits: int = option(
        8, "Bits of an activation.", group="quantization", least=2, most=8
    )
    first_last_bits: int = option(
        7, "Minimum bits of weights in the first and last layer, if others have fewer than 7.",
        group="quantization", least=2, most=8,
    )  # fmt: skip
    layer_bits: tuple[str, ...] | None = option(
        None, "Bits of single layers' weights, as LAYER=BITS; they come before weight_bits and "
        "first_last_bits. On the command line also a file: the mixed_precision.json of divqat "
        "sensitivity.", group="quantization",
    )  # fmt: skip
    ranges: str = option(
        "auto",
        "Activation ranges that quantize a batch: exact: updated with this batch; delayed: from "
        "before it; auto: exact, or delayed with several processes or accumulate above 1.",
        group="quantization",
        choices=("auto", "exact", "delayed"),
    )
    freeze_observers_epoch: int | None = option(
        None,
        "First epoch, counted from 1, with frozen activation ranges; more than epochs: never. "
        "None: the start of the last third.",
        group="quantization",
        least=2,
    )
    freeze_batchnorm_epoch: int | None = option(
        None, "First epoch with frozen BatchNorm statistics. None: the start of the last third, or "
        "with misdirect or kd-qat the last epoch, or with misdirect_target reject none.",
        group="quantization", least=1,
    )  # fmt: skip
    activation_ranges: str = option(
        "average", "Ranges of method ptq: average: moving average of the batches' ends; minmax: "
        "all values; percentile, mse (least squared error), entropy (least KL divergence): a part.",
        group="post-training quantization", choices=ACTIVATION_RANGES,
    )  # fmt: skip
    percentile: float = option(
        99.99, "With activation_ranges percentile: the percentage of values that is not clipped at "
        "each end.", group="post-training quantization", above=50, most=100,
    )  # fmt: skip
    weight_ranges: str = option(
        "minmax", "Ranges of weights with method ptq: minmax, or mse: the least squared error.",
        group="post-training quantization", choices=WEIGHT_RANGES,
    )  # fmt: skip
    equalize: bool = option(
        False, "With method ptq: give the channels between two layers weights of similar size. For "
        "weights with one scale per tensor (preset qnnpack).", group="post-training quantization",
    )  # fmt: skip
    rounding: str = option(
        "nearest", "Rounding of weights with method ptq: nearest, or learned layer by layer "
        "(AdaRound).", group="post-training quantization", choices=ROUNDINGS,
    )  # fmt: skip
    rounding_steps: int = option(
        1000, "With rounding learned: steps for each layer.",
        group="post-training quantization", least=1,
    )  # fmt: skip
    bias_correction: bool = option(
        False, "With method ptq: correct biases so that no channel's mean changes.",
        group="post-training quantization",
    )  # fmt: skip
    calibration_images: int = option(
        512, "Training images for these, unless all are defaults: then ptq observes the ranges of "
        "all training images.", group="post-training quantization", least=1,
    )  # fmt: skip
