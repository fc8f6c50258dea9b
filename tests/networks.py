"""Small networks that tests of prepare and export share: what people write in a forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from testing import randn
from torch import Tensor, nn
from torch.nn import functional as F

from divqat import models
from divqat.nn._layer import QuantLayer

SIZE = 12


class Net(nn.Module):
    """``forward(net, x)`` over the modules given by name."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def residual() -> nn.Module:
    def forward(net, x):
        y = F.relu(net.bn1(net.conv1(x)))
        y = F.relu(torch.add(net.conv2(y), y))
        y = F.avg_pool2d(y, 2)
        return net.head(y.mean((2, 3)))

    return Net(
        forward,
        conv1=conv(3, 8), bn1=nn.BatchNorm2d(8), conv2=conv(8, 8), head=nn.Linear(8, 5),
    )  # fmt: skip


def concat_hardswish() -> nn.Module:
    def forward(net, x):
        y = net.swish(net.bn1(net.conv1(x)))
        y = torch.cat([net.left(y), F.hardswish(net.right(y))], 1)
        y = net.pool(net.relu6(net.bn2(net.conv2(y))))
        return net.head(torch.flatten(y, 1))

    return Net(
        forward,
        conv1=conv(3, 8, bias=False), bn1=nn.BatchNorm2d(8), swish=nn.Hardswish(),
        left=conv(8, 4, 1), right=conv(8, 4), conv2=conv(8, 8, groups=2), bn2=nn.BatchNorm2d(8),
        relu6=nn.ReLU6(), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(8, 5),
    )  # fmt: skip


def in_place() -> nn.Module:
    def forward(net, x):
        y = net.relu(net.bn1(net.conv1(x)))
        z = net.conv2(y)
        z += y
        z = net.pool(net.relu(z))
        return net.head(z.view(z.size(0), -1))

    return Net(
        forward,
        conv1=conv(3, 8), bn1=nn.BatchNorm2d(8), conv2=conv(8, 8), relu=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(4), head=nn.Linear(8 * 9, 5),
    )  # fmt: skip


def shared() -> nn.Module:
    """One convolution, its BatchNorm and a ReLU, each called twice."""

    def forward(net, x):
        y = net.relu(net.stem(x))
        for _ in range(2):
            y = net.relu(net.bn(net.conv(y)))
        return net.head(y.mean([-1, -2]))

    return Net(
        forward,
        stem=conv(3, 8), conv=conv(8, 8), bn=nn.BatchNorm2d(8), relu=nn.ReLU(),
        head=nn.Linear(8, 5),
    )  # fmt: skip


def up_and_down() -> nn.Module:
    def forward(net, x):
        y = torch.sigmoid(net.up(F.relu(net.down(x)))) * x
        return net.head(net.last(y).flatten(2).mean(-1))

    return Net(
        forward,
        down=nn.Conv2d(3, 8, 3, 2, 1), up=nn.ConvTranspose2d(8, 3, 4, 2, 1), last=conv(3, 6),
        head=nn.Linear(6, 5),
    )  # fmt: skip


def preactivation() -> nn.Module:
    """BatchNorm before the convolution, which nothing can fold, and a value with two readers."""

    def forward(net, x):
        y = net.stem(x)
        y = y + net.conv1(F.relu(net.bn1(y)))
        first, second = y.chunk(2, 1)
        return net.head(net.dropout(torch.cat((second, first), dim=1)).amax((2, 3)))

    return Net(
        forward,
        stem=conv(3, 8), bn1=nn.BatchNorm2d(8), conv1=conv(8, 8), dropout=nn.Dropout(0.0),
        head=nn.Linear(8, 5),
    )  # fmt: skip


HAND_WRITTEN = {
    build.__name__: build
    for build in (residual, concat_hardswish, in_place, shared, up_and_down, preactivation)
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A network with random weights and BatchNorms that are not the identity."""
    torch.manual_seed(seed)
    if name in HAND_WRITTEN:
        model = HAND_WRITTEN[name]()
    else:
        model = models.build(name, in_channels=3, num_classes=5, image_size=SIZE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def images(n: int = 8, seed: int = 0) -> Tensor:
    """Smooth random images in [-1, 1], each of its own color and contrast."""
    coarse = randn(n, 3, 4, 4, seed=seed)
    fine = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear") + 0.2 * randn(
        n, 3, SIZE, SIZE, seed=seed + 1
    )
    return (fine + 0.5 * randn(n, 3, 1, 1, seed=seed + 2)).clamp(-2, 2) / 2


def settle(model: nn.Module, batches: int = 20) -> nn.Module:
    """Let BatchNorm and observers see some batches, as training would."""
    model.train()
    with torch.no_grad():
        for seed in range(batches):
            model(images(16, seed=100 + seed))
    return model


def quantized(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
