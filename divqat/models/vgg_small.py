"""A small VGG: 3x3 convolutions, batch norm, two poolings."""

from __future__ import annotations

from torch import Tensor, nn

from divqat.models.blocks import conv_bn, initialize


class VGGSmall(nn.Module):
    """Five 3x3 convolutions, global average pooling and one linear layer."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(in_channels, 24, activation=nn.ReLU()),
            nn.MaxPool2d(2),
            conv_bn(24, 48, activation=nn.ReLU()),
            conv_bn(48, 48, activation=nn.ReLU()),
            nn.MaxPool2d(2),
            conv_bn(48, 96, activation=nn.ReLU()),
            conv_bn(96, 96, activation=nn.ReLU()),
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, num_classes)
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, num_classes]
        return self.classifier(self.features(x))
