"""Post-training quantization as a training whose steps only look."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from divqat.quantize import observing
from divqat.train.step import Step


class Observation(Step):
    """A step that moves the activation ranges and nothing else.

    No weight and no BatchNorm statistic changes; a range is a moving average of the batches' ends,
    as in training. Loss and cross-entropy are those of the network that is observed: its weights
    are quantized as they are deployed, its activations are not. Usual are ranges of the network
    with float weights (Krishnamoorthi 2018, §3); those of the deployed weights are the ones that
    the runtime meets.
    """

    def modes(self) -> AbstractContextManager[None]:
        return observing(self.model)

    @torch.no_grad()
    def forward(self, net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        return super().forward(net, images)

    def backward(self, loss: Tensor) -> None:
        pass

    def update(self) -> None:
        pass
