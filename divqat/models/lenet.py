"""LeNet-5 (LeCun et al. 1998) with ReLU, max pooling and batch norm."""

from __future__ import annotations

from torch import Tensor, nn

from divqat.models.blocks import conv_bn, initialize


class LeNet(nn.Module):
    """Two 5x5 convolutions and three linear layers, whose size depends on that of the image."""

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = image_size
        self.features = nn.Sequential(
            conv_bn(in_channels, 6, 5, activation=nn.ReLU()),
            nn.MaxPool2d(2),
            conv_bn(6, 16, 5, activation=nn.ReLU()),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * (height // 4) * (width // 4), 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, num_classes]
        return self.classifier(self.features(x))
