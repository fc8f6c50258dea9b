"""Three small CNNs that answer together."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from divqat.models.mobilenetv2_small import MobileNetV2Small
from divqat.models.resnet20 import ResNet20
from divqat.models.vgg_small import VGGSmall

MEMBERS = {"vgg_small": VGGSmall, "resnet20": ResNet20, "mobilenetv2_small": MobileNetV2Small}


class Ensemble(nn.Module):
    """The logarithm of the mean of its members' probabilities, which is that of its own.

    The ensemble of MISLEADER (see :mod:`divqat.nn.misleader`), there of ResNet-18, MobileNetV2 and
    DenseNet-121. An inference costs as much as those of all members.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(make(in_channels, num_classes) for make in MEMBERS.values())

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, num_classes]
        answers = torch.stack([member(x).log_softmax(1) for member in self.members])
        return answers.logsumexp(0) - math.log(len(MEMBERS))
