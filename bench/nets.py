"""The networks whose shapes are measured: divqat's ResNet-20, and two for images of 224 px."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from divqat.models import ResNet20
from divqat.models.blocks import conv_bn, initialize
from divqat.models.mobilenetv2_small import InvertedResidual


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv = nn.Sequential(
            conv_bn(inputs, width, 1, activation=nn.ReLU()),
            conv_bn(width, width, stride=stride, activation=nn.ReLU()),
            conv_bn(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else conv_bn(inputs, outputs, 1, stride=stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x) + (x if self.shortcut is None else self.shortcut(x)))


def _classifier(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al. 2016, table 1), with the stride in the 3x3 convolutions (v1.5)."""
    stem = conv_bn(3, 64, 7, stride=2, activation=nn.ReLU())
    layers: list[nn.Module] = [stem, nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for stride in (first_stride, *[1] * (blocks - 1)):
            layers.append(Bottleneck(inputs, width, stride))
            inputs = 4 * width
    model = nn.Sequential(*layers, _classifier(inputs, classes))
    initialize(model)
    return model


def mobilenetv2(classes: int = 1000) -> nn.Module:
    """MobileNetV2 of width 1 (Sandler et al. 2018, table 2), without its dropout."""
    layers: list[nn.Module] = [conv_bn(3, 32, stride=2, activation=nn.ReLU6())]
    inputs = 32
    for expansion, outputs, blocks, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for stride in (first_stride, *[1] * (blocks - 1)):
            layers.append(InvertedResidual(inputs, outputs, stride, expansion))
            inputs = outputs
    head = conv_bn(inputs, 1280, 1, activation=nn.ReLU6())
    model = nn.Sequential(*layers, head, _classifier(1280, classes))
    initialize(model)
    return model


@dataclass(frozen=True)
class Network:
    """A network and the size of its data.

    Attributes:
        build: creates it with random weights.
        size: height and width of its images.
        classes: number of logits.
        batch: device → batch size for measurements of activations.
        batches: device → batch sizes for measurements of training steps.
        activations: [C, H, W] of an early, a middle and a late activation.
    """

    build: Callable[[], nn.Module]
    size: int
    classes: int
    batch: dict[str, int]
    batches: dict[str, tuple[int, ...]]
    activations: tuple[tuple[int, int, int], ...]


NETWORKS = {
    "ResNet-20": Network(
        lambda: ResNet20(in_channels=3, num_classes=10), 32, 10,
        {"cpu": 128, "cuda": 1024},
        {"cpu": (128, 1024), "cuda": (1024, 4096)},
        ((16, 32, 32), (32, 16, 16), (64, 8, 8)),
    ),
    "ResNet-50": Network(
        resnet50, 224, 1000,
        {"cpu": 8, "cuda": 128},
        {"cpu": (8,), "cuda": (64, 256)},
        ((64, 112, 112), (512, 28, 28), (2048, 7, 7)),
    ),
    "MobileNetV2": Network(
        mobilenetv2, 224, 1000,
        {"cpu": 8, "cuda": 128},
        {"cpu": (8,), "cuda": (64, 256)},
        ((96, 112, 112), (144, 56, 56), (1280, 7, 7)),
    ),
}  # fmt: skip


def weights(network: str) -> list[Tensor]:
    """The weights of a network's convolutions and linear layers, with random values."""
    layers = (nn.Conv2d, nn.Linear)
    modules = NETWORKS[network].build().modules()
    return [module.weight.detach() for module in modules if isinstance(module, layers)]
