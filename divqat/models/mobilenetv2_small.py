"""A small MobileNetV2 (Sandler et al. 2018): inverted residuals for small images."""

from __future__ import annotations

from torch import Tensor, nn

from divqat.models.blocks import conv_bn, initialize


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [
            conv_bn(hidden, hidden, stride=stride, groups=hidden, activation=nn.ReLU6()),
            conv_bn(hidden, outputs, 1),
        ]
        if expansion != 1:
            layers.insert(0, conv_bn(inputs, hidden, 1, activation=nn.ReLU6()))
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2Small(nn.Module):
    """A stem, seven inverted residuals with 16 to 64 channels, a 1x1 head, one linear layer."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(in_channels, 16, activation=nn.ReLU6())
        blocks, inputs = [], 16
        for outputs, strides, expansion in (
            (16, [1], 1),
            (24, [2, 1], 4),
            (32, [2, 1], 4),
            (64, [1, 1], 4),
        ):
            for stride in strides:
                blocks.append(InvertedResidual(inputs, outputs, stride, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            conv_bn(64, 128, 1, activation=nn.ReLU6()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, num_classes),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, num_classes]
        return self.classifier(self.blocks(self.stem(x)))
