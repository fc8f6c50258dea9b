"""Post-training quantization, as a training whose steps only observe activation ranges."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from divqat.quantize import observing
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
