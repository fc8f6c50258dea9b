"""More of `CONSTRUCTS`: weights of one's own, training mode, control flow, state, upsampling."""

from __future__ import annotations

from collections import namedtuple

import torch
from constructs import CLASSES, Body, construct, conv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Weights of one's own


class OwnConstructor(nn.Conv2d):
    """A convolution with a constructor of its own."""

    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)


@construct(int8=3, exports=False)
def convolution_with_own_constructor():
    return Body(inner=OwnConstructor(8))


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@construct(int8=3)
def weight_standardization():
    return Body(inner=Standardized(8, 8, 3, padding=1))


class SamePadding(nn.Conv2d):
    """TensorFlow's padding, computed from the size of the input."""

    def forward(self, x):
        over = [max((-(-s // 2) - 1) * 2 + 3 - s, 0) for s in x.shape[-2:]]
        h, w = over
        x = F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


@construct(int8=3, exports=False)
def padding_from_the_size():
    return Body(inner=SamePadding(8, 8, 3, stride=2))


@construct(int8=4)
class OwnParameters(Body):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(0.2 * torch.randn(8, 8, 3, 3))
        self.matrix = nn.Parameter(0.3 * torch.randn(8, 8))

    def middle(self, y):
        y = F.relu(F.conv2d(y, self.kernel, padding=1))
        return (y.permute(0, 2, 3, 1) @ self.matrix).permute(0, 3, 1, 2)


@construct(int8=3, exports=False)
class FunctionalLinear(Body):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.rand(8))

    def middle(self, y):
        y = F.linear(y.mean((2, 3)), self.weight, self.bias)
        return y[:, :, None, None]


@construct(int8=4, exports=False)
class SharedLayer(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8))

    def middle(self, y):
        for _ in range(2):
            y = F.relu(self.conv(y))
        return y


@construct(int8=4, exports=False)
class TiedWeights(Body):
    """Two layers with the same parameter."""

    def __init__(self):
        super().__init__(conv1=conv(8, 8), conv2=conv(8, 8))
        self.conv2.weight = self.conv1.weight

    def middle(self, y):
        return self.conv2(F.relu(self.conv1(y)))


# Training and eval mode


class DropPath(nn.Module):
    """Stochastic depth, of whole samples."""

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5).div_(0.5)


@construct(int8=4, differs=True, exports=False)
class StochasticDepth(Body):
    def __init__(self):
        super().__init__(conv1=conv(8, 8), conv2=conv(8, 8), drop=DropPath())

    def middle(self, y):
        y = y + self.drop(self.conv1(y))
        return y + self.drop(self.conv2(y))


@construct(int8=3, differs=True, exports=False)
class FunctionalDropout(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8))

    def middle(self, y):
        return F.dropout(self.conv(F.dropout2d(y, 0.2, self.training)), training=self.training)


@construct(int8=3, differs=True, exports=False)
class NoiseInTraining(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8))

    def middle(self, y):
        if self.training:
            y = y + 0.1 * torch.randn_like(y)
        return self.conv(y)


Auxiliary = namedtuple("Auxiliary", ["logits", "aux"])


@construct(int8=3, differs=True, train_outputs=2, exports=False)
class AuxiliaryHead(nn.Module):
    """A second output, in training mode only."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = conv(3, 8), conv(8, 8)
        self.head, self.aux = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x):
        y = F.relu(self.stem(x))
        aux = self.aux(y.mean((2, 3))) if self.training else None
        logits = self.head(F.relu(self.conv(y)).mean((2, 3)))
        return Auxiliary(logits, aux) if self.training else logits


@construct(int8=3, exports=False)
class Checkpointed(Body):
    def __init__(self):
        super().__init__(block=nn.Sequential(conv(8, 8), nn.ReLU()))

    def middle(self, y):
        return checkpoint(self.block, y, use_reentrant=False)


# Control flow, state, containers


@construct(int8=3, exports=False)
class ShapesDecide(Body):
    """Branches and loops over sizes, and tensors of a size."""

    def __init__(self):
        super().__init__(conv=conv(8, 8))

    def middle(self, y):
        if y.shape[-1] % 2:
            y = F.pad(y, (0, 1))
        total = torch.zeros(y.shape[0], 1, *y.shape[2:])
        for channel in range(y.shape[1]):
            total = total + y[:, channel : channel + 1] * (channel + 1)
        return self.conv(y + total / y.size(1))


@construct(int8=3)
class InPlace(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8))

    def middle(self, y):
        z = self.conv(y)
        z += y
        z[:, 0] = 0
        z.mul_(0.5)
        return z.relu_()


@construct(int8=4, exports=False)
class Containers(Body):
    def __init__(self):
        super().__init__(
            several=nn.ModuleList([conv(8, 8), nn.ReLU()]),
            named=nn.ModuleDict({"a": conv(8, 8), "unused": nn.Linear(3, 3)}),
            sequence=nn.Sequential(nn.Identity(), nn.Hardswish()),
        )

    def middle(self, y):
        for module in self.several:
            y = module(y)
        return self.sequence[-1](self.named["a"](y))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@construct(int8=3, pickles=False, exports=False)
def lambda_modules():
    return Body(inner=nn.Sequential(Lambda(lambda x: x * 2 - 1), conv(8, 8), Lambda(torch.abs)))


@construct(int8=3)
class Buffers(Body):
    """Buffers as constants: a normalization, an index."""

    def __init__(self):
        super().__init__(conv=conv(8, 8))
        self.register_buffer("mean", torch.rand(1, 8, 1, 1))
        self.register_buffer("order", torch.randperm(8), persistent=False)

    def middle(self, y):
        return self.conv(((y - self.mean) / 0.3)[:, self.order])


def halved(module, args, output):
    """A forward hook."""
    return output * 0.5


@construct(int8=4, exports=False)
def forward_hooks():
    net = Body(inner=nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)))
    net.inner.register_forward_hook(halved)
    net.inner[0].register_forward_hook(halved)
    return net


@construct(int8=2, keeps=("width", "names", "features"), exports=False)
class OwnAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.names = 8, {"head": "linear"}
        self.stem, self.head = conv(3, self.width), nn.Linear(self.width, CLASSES)

    def features(self, x):
        return F.relu(self.stem(x)).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x)) / self.width


@construct(int8=3, refused="if y.sum() > 0")
class DataDecides(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8))

    def middle(self, y):
        if y.sum() > 0:
            y = -y
        return self.conv(y)


@construct(int8=3, refused="y.max().item()")
class Item(Body):
    def __init__(self):
        super().__init__(conv=conv(8, 8))

    def middle(self, y):
        return self.conv(y / y.max().item())


@construct(int8=3, exports=False)
class PostponedAnnotations(nn.Module):
    """Annotations that are strings, by the future import at the top of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.relu(self.stem(x)))
        return self.head(y.mean((2, 3)))


# Upsampling


@construct(int8=3)
class Segmentation(nn.Module):
    """It ends with a convolution, and the size of the input."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = conv(3, 8), conv(8, 8, stride=2)
        self.classifier = conv(8, CLASSES, 1)

    def forward(self, x):
        y = self.classifier(F.relu(self.down(F.relu(self.stem(x)))))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


@construct(int8=3, exports=False)
class FinalConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, CLASSES))

    def forward(self, x):
        return self.layers(x)


@construct(int8=4)
class Interpolation(Body):
    def __init__(self):
        super().__init__(conv1=conv(8, 8), conv2=conv(8, 8))

    def middle(self, y):
        small = F.relu(self.conv1(F.max_pool2d(y, 2)))
        z = F.interpolate(small, scale_factor=2) + F.interpolate(small, y.shape[2:])
        return self.conv2(z + y)
