"""The trainings whose accuracy is compared: settings and baseline of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

COMMON = dict(dataset="fashion-mnist", model="vgg_small", batch_size=128, pad=2, flip=True)
FP = dict(epochs=6, lr=0.1, schedule="one-cycle")
QAT = dict(epochs=3, lr=0.005, weight_bits=8)  # as in the published results
LENET = dict(model="lenet")  # a small network, as float16 is slow on CPUs
BFLOAT16, FLOAT16 = dict(precision="bfloat16"), dict(precision="float16")
LARGE = dict(batch_size=1024, base_batch_size=128)
LINEAR = dict(LARGE, lr_scaling="linear")
VGG_SMALL, LENET_NAME = "VGG-small", "LeNet"


@dataclass(frozen=True)
class Variant:
    """Changes of ``FP`` and ``QAT``, which both follow ``COMMON``; ``base`` names the baseline."""

    base: str
    fp: dict[str, Any] = field(default_factory=dict)
    qat: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    VGG_SMALL: Variant(VGG_SMALL),
    "VGG-small, bfloat16": Variant(VGG_SMALL, BFLOAT16, BFLOAT16),
    "VGG-small, QAT with batch 1024": Variant(VGG_SMALL, qat=dict(LINEAR, lr_warmup_epochs=0.5)),
    "VGG-small, QAT with batch 1024, LARS": Variant(
        VGG_SMALL, qat=dict(LARGE, lr_warmup_epochs=0.5, optimizer="lars", lr=0.2)
    ),
    "VGG-small, QAT with batch 1024, LAMB": Variant(
        VGG_SMALL, qat=dict(LARGE, lr_warmup_epochs=0.5, optimizer="lamb", lr=0.001)
    ),
    "VGG-small, both with batch 1024": Variant(
        VGG_SMALL, dict(LINEAR, lr_warmup_epochs=2), dict(LINEAR, lr_warmup_epochs=0.5)
    ),
    "VGG-small, both with batch 1024, 10 epochs before QAT": Variant(
        VGG_SMALL, dict(LINEAR, lr_warmup_epochs=2, epochs=10), dict(LINEAR, lr_warmup_epochs=0.5)
    ),
    "VGG-small, both with batch 1024, 10 epochs before QAT, square root": Variant(
        VGG_SMALL,
        dict(LINEAR, lr_warmup_epochs=2, epochs=10),
        dict(LARGE, lr_scaling="sqrt", lr_warmup_epochs=0.5),
    ),
    LENET_NAME: Variant(LENET_NAME, LENET, LENET),
    "LeNet, bfloat16": Variant(LENET_NAME, LENET | BFLOAT16, LENET | BFLOAT16),
    "LeNet, float16": Variant(LENET_NAME, LENET | FLOAT16, LENET | FLOAT16),
}
