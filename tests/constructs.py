"""Small networks with one construct each that people write; `CONSTRUCTS` says what to expect.

Here: norms, activations, moves of values, convolutions. `constructs_flow.py` adds weights of one's
own, training mode and control flow, `constructs_tokens.py` attention, inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from testing import randn
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 8
CLASSES = 5


def image(n: int, seed: int) -> tuple[Tensor]:
    """Smooth images [N, 3, 8, 8]."""
    coarse = F.interpolate(randn(n, 3, 3, 3, seed=seed), (SIZE, SIZE), mode="bilinear")
    return (coarse + 0.2 * randn(n, 3, SIZE, SIZE, seed=seed + 1),)


@dataclass(frozen=True)
class Construct:
    """A network and what to expect of it.

    Attributes:
        build: makes it, with random weights.
        int8: number of products with a weight that ONNX Runtime can run with integer kernels, once
            per call.
        differs: whether training mode gives other outputs than eval mode.
        outputs: number of output tensors in eval mode.
        train_outputs: the same in training mode.
        inputs: (n, seed) → the arguments of a call.
        trains: whether the float network runs in training mode on a CPU.
        pickles: whether the float network can be pickled.
        exports: whether its export is tested, too: no other construct has its operations.
        keeps: attributes and methods that the prepared network keeps.
        refused: a part of the line at which `prepare` has to refuse it; None: it is accepted.
    """

    build: Callable[[], nn.Module]
    int8: int
    differs: bool = False
    outputs: int = 1
    train_outputs: int = 1
    inputs: Callable[[int, int], tuple[Tensor, ...]] = image
    trains: bool = True
    pickles: bool = True
    exports: bool = True
    keeps: tuple[str, ...] = ()
    refused: str | None = None


CONSTRUCTS: dict[str, Construct] = {}


def construct(**expected):
    """Add a class, or a function that makes a network, to the table."""

    def add(build):
        expected.setdefault("train_outputs", expected.get("outputs", 1))
        CONSTRUCTS[build.__name__] = Construct(build, **expected)
        return build

    return add


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2} | options)


class Body(nn.Module):
    """A convolution, the construct on [N, 8, 8, 8], and a linear layer."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        for name, module in modules.items():
            self.add_module(name, module)
        self.head = nn.Linear(8, CLASSES)

    def middle(self, y):
        return self.inner(y)

    def forward(self, x):
        return self.head(self.middle(F.relu(self.stem(x))).mean((2, 3)))


def between(module: nn.Module) -> nn.Module:
    """``module`` between two convolutions."""
    return Body(inner=nn.Sequential(conv(8, 8), module, conv(8, 8)))


# BatchNorm


@construct(int8=3, differs=True)
class FunctionalBatchNorm(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8, bias=False), bn=nn.BatchNorm2d(8))

    def middle(self, y):
        bn = self.bn
        y = F.batch_norm(
            self.conv(y), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training
        )
        return F.relu(y)


class BatchNormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, and a forward of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return self.act(F.batch_norm(x, *statistics, self.training, self.momentum, self.eps))


@construct(int8=4, differs=True, exports=False)
def batch_norm_with_activation():
    return between(BatchNormAct(8))


@construct(int8=4, differs=True)
def batch_norm_after_relu():
    return between(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)))


@construct(int8=4, differs=True, exports=False)
def batch_norm_before_relu():
    return between(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))


@construct(int8=3, differs=True, exports=False)
class PreActivation(Body):
    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(8), conv=conv(8, 8))

    def middle(self, y):
        return y + self.conv(F.relu(self.norm(y)))


@construct(int8=5, differs=True)
class DenseConcatenation(Body):
    def __init__(self):
        norms = {f"norm{i}": nn.BatchNorm2d(8 + 4 * i) for i in range(2)}
        convs = {f"conv{i}": conv(8 + 4 * i, 4, bias=False) for i in range(2)}
        super().__init__(**norms, **convs, out=conv(16, 8, 1))

    def middle(self, y):
        features = [y]
        for norm, layer in ((self.norm0, self.conv0), (self.norm1, self.conv1)):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return self.out(torch.cat(features, 1))


@construct(int8=3, differs=True, exports=False)
class TwoBatchNorms(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8), first=nn.BatchNorm2d(8), second=nn.BatchNorm2d(8))

    def middle(self, y):
        y = self.conv(y)
        return F.relu(self.first(y)) + self.second(y)


@construct(int8=4, differs=True, exports=False)
class SharedBatchNorm(Body):
    def __init__(self):
        super().__init__(conv1=conv(8, 8), conv2=conv(8, 8), norm=nn.BatchNorm2d(8))

    def middle(self, y):
        return F.relu(self.norm(self.conv2(F.relu(self.norm(self.conv1(y))))))


@construct(int8=4, differs=True, trains=False, exports=False)
def sync_batch_norm():
    net = between(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


@construct(int8=4, differs=True, exports=False)
def batch_norm_without_statistics():
    return between(nn.BatchNorm2d(8, affine=False, momentum=None))


@construct(int8=2, differs=True)
def transposed_convolution_and_batch_norm():
    """ONNX Runtime has no integer kernel for the transposed one."""
    up = nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False)
    return Body(inner=nn.Sequential(up, nn.BatchNorm2d(8), nn.ReLU()))


@construct(int8=4, differs=True, exports=False)
class Reparameterizable(Body):
    """RepVGG: two convolutions and the identity, each with a BatchNorm."""

    def __init__(self):
        norms = {f"norm{i}": nn.BatchNorm2d(8) for i in range(3)}
        super().__init__(
            conv3=conv(8, 8, bias=False),
            conv1=conv(8, 8, 1, bias=False),
            **norms,
            out=nn.Identity(),
        )

    def middle(self, y):
        y = self.norm0(self.conv3(y)) + self.norm1(self.conv1(y)) + self.norm2(y)
        return F.relu(y)


# Other norms


@construct(int8=4)
def group_norm():
    return between(nn.GroupNorm(2, 8))


@construct(int8=4)
def instance_norm():
    return between(nn.InstanceNorm2d(8, affine=True))


@construct(int8=4, exports=False)
def layer_norm():
    return between(nn.LayerNorm([8, SIZE, SIZE]))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@construct(int8=5)
class ConvNext(Body):
    """Depthwise convolution, LayerNorm, linear layers in channels-last order, layer scale."""

    def __init__(self):
        super().__init__(conv=conv(8, 8, groups=8), norm=nn.LayerNorm(8))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))

    def middle(self, y):
        z = self.norm(self.conv(y).permute(0, 2, 3, 1))
        z = self.down(F.gelu(self.up(z)))
        return y + self.gamma * z.permute(0, 3, 1, 2)


@construct(int8=4, exports=False)
def norm_subclass():
    return between(ChannelNorm(8))


# Activations


@construct(int8=4)
def prelu():
    return between(nn.PReLU(8))


@construct(int8=4, exports=False)
def elu():
    return between(nn.ELU())


@construct(int8=4, exports=False)
def mish():
    return between(nn.Mish())


@construct(int8=4, exports=False)
def relu_in_place():
    return between(nn.Sequential(nn.ReLU(inplace=True), nn.Hardtanh(0.0, 0.5), nn.Softplus()))


@construct(int8=5)
class SqueezeExcite(Body):
    def __init__(self):
        super().__init__(down=conv(8, 4, 1), up=conv(4, 8, 1), conv=conv(8, 8))

    def middle(self, y):
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return self.conv(y) * gate


# Moves of values


@construct(int8=6)
class ChunkAndConcatenate(Body):
    """C2f of YOLOv8."""

    def __init__(self):
        super().__init__(into=conv(8, 8, 1), conv1=conv(4, 4), conv2=conv(4, 4), out=conv(16, 8, 1))

    def middle(self, y):
        parts = list(self.into(y).chunk(2, 1))
        parts.extend(layer(parts[-1]) for layer in (self.conv1, self.conv2))
        return self.out(torch.cat(parts, 1))


@construct(int8=4)
class SplitInSizes(Body):
    def __init__(self):
        super().__init__(left=conv(3, 8), right=conv(5, 8))

    def middle(self, y):
        left, right = torch.split(y, [3, 5], dim=1)
        return self.left(left) * self.right(right)


@construct(int8=3, exports=False)
class Unbind(Body):
    def __init__(self):
        super().__init__(conv=conv(4, 8))

    def middle(self, y):
        first, second = y.unflatten(1, (2, 4)).unbind(1)
        return self.conv(torch.maximum(first, second))


@construct(int8=4)
class ChannelShuffle(Body):
    def __init__(self):
        super().__init__(conv1=conv(4, 4, groups=2), conv2=conv(8, 8))

    def middle(self, y):
        left, right = y.chunk(2, dim=1)
        y = torch.cat((left, self.conv1(right)), dim=1)
        n, c, h, w = y.size()
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.conv2(y)


@construct(int8=3)
class Focus(Body):
    """Slices with steps, stack and roll."""

    def __init__(self):
        super().__init__(conv=conv(32, 8, 1))

    def middle(self, y):
        corners = [y[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        y = torch.stack(corners, 1).flatten(1, 2)
        return self.conv(torch.roll(y, (1, -1), dims=(2, 3)))


@construct(int8=3)
def pixel_shuffle():
    return Body(inner=nn.Sequential(nn.PixelShuffle(2), conv(2, 8)))


# Padding and pooling


@construct(int8=3)
def reflect_padding():
    return Body(inner=conv(8, 8, padding_mode="reflect"))


@construct(int8=3, exports=False)
def circular_padding():
    return Body(inner=conv(8, 8, padding_mode="circular"))


@construct(int8=3, exports=False)
def padding_by_name():
    return Body(inner=nn.Conv2d(8, 8, (3, 2), padding="same", dilation=2))


@construct(int8=4)
class FunctionalPadding(Body):
    def __init__(self):
        super().__init__(conv1=conv(8, 8, padding=0), conv2=conv(8, 8, padding=0))

    def middle(self, y):
        y = self.conv1(F.pad(y, (1, 1, 1, 1), mode="reflect"))
        return self.conv2(F.pad(y, [0, 1, 0, 1], value=0.5))


@construct(int8=3, exports=False)
def ceil_mode_pooling():
    pool = nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False)
    return Body(inner=nn.Sequential(pool, conv(8, 8), nn.MaxPool2d(3, 2, ceil_mode=True)))


# Convolutions


@construct(int8=5)
def kinds_of_convolutions():
    return Body(
        inner=nn.Sequential(
            conv(8, 8, groups=8), conv(8, 8, groups=2), conv(8, 8, dilation=2), nn.ReLU6()
        )
    )


@construct(int8=3, differs=True)
class OneDimension(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv1d(24, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.conv2, self.head = nn.Conv1d(8, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x):
        y = F.relu(self.norm(self.conv1(x.flatten(1, 2))))
        return self.head(self.conv2(y).mean(2))


@construct(int8=3, differs=True)
class ThreeDimensions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.conv2, self.head = nn.Conv3d(4, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x):
        y = F.relu(self.norm(self.conv1(x.unsqueeze(1))))
        return self.head(self.conv2(y).mean((2, 3, 4)))
