"""Activation ranges and BatchNorm statistics that are observed alone, or frozen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from divqat._util.seeds import derived_seed
from divqat.data import LabeledImages, batches
from divqat.quantize import freeze_batchnorm, freeze_observers, observing, ptq
from divqat.train.config import POST_TRAINING, TrainConfig
from divqat.train.step import Step


class CalibrationStep(Step):
    """A step that updates the activation ranges and nothing else.

    Weights and BatchNorm statistics stay. As in training, a range is a moving average of the
    batches' minimum and maximum. Ranges are observed with quantized weights and float activations,
    and the reported loss is that of this network. The usual choice is float weights (Krishnamoorthi
    2018, §3), but at inference the activations come from the quantized ones.
    """

    def training_mode(self) -> AbstractContextManager[None]:
        return observing(self.model)

    @torch.no_grad()
    def forward(self, net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        return super().forward(net, images)

    def backward(self, loss: Tensor) -> None:
        pass

    def update(self) -> None:
        pass


def calibrate(model: nn.Module, config: TrainConfig, train_set: LabeledImages) -> None:
    """Quantize a prepared model by :func:`divqat.ptq` with some of the training images.

    Args:
        model: holds the teacher's weights.
        config: its settings of post-training quantization and batch size.
        train_set: of which it takes ``calibration_images``, by the seed.
    """
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "calibration"))
    taken, left = list[Tensor](), config.calibration_images
    for images, _ in batches(train_set, min(config.batch_size, left), generator=generator):
        taken.append(images[:left])
        left -= len(images)
        if left <= 0:
            break
    ptq(
        model, taken, percentile=config.percentile, rounding_steps=config.rounding_steps,
        seed=derived_seed(config.seed, "rounding"),
        **{name: getattr(config, name) for name in POST_TRAINING},
    )  # fmt: skip


def freeze(model: nn.Module, config: TrainConfig, epoch: int) -> tuple[bool, bool]:
    """Freeze observers and BatchNorm if they are frozen in ``epoch``; returns whether they are."""
    observers, batchnorm = (config.is_frozen(what, epoch) for what in ("observers", "batchnorm"))
    if observers:
        freeze_observers(model)
    if batchnorm:
        freeze_batchnorm(model)
    return observers, batchnorm
