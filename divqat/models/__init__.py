"""Small CNNs for small images, all traceable by torch.fx, and a way to build your own networks.

They map float images [N, C, H, W] to logits [N, num_classes].

Example:
    >>> import torch
    >>> model = build("lenet", in_channels=1, num_classes=10, image_size=8)
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
"""

from __future__ import annotations

from torch import nn

from divqat._util.errors import unknown_name
from divqat._util.foreign import foreign, is_foreign
from divqat.models.ensemble import Ensemble
from divqat.models.lenet import LeNet
from divqat.models.mobilenetv2_small import MobileNetV2Small
from divqat.models.resnet20 import ResNet20
from divqat.models.vgg_small import VGGSmall

__all__ = ["Ensemble", "LeNet", "MobileNetV2Small", "ResNet20", "VGGSmall", "build", "names"]

ENSEMBLE = "ensemble"  # only for victims, not for clones
MIN_SIZE = 8  # every network halves the image at least twice


def names() -> list[str]:
    """The names of single networks that :func:`build` knows."""
    return ["lenet", "resnet20", "vgg_small", "mobilenetv2_small"]


def build(
    name: str, *, in_channels: int, num_classes: int, image_size: int | tuple[int, int]
) -> nn.Module:
    """A network with random weights; ``torch.manual_seed`` determines them.

    Args:
        name: one of :func:`names`, ``ensemble``, or ``module:function``: a function (or class) that
            takes the three arguments below by keyword, ``image_size`` as (H, W), and returns the
            network; see :func:`divqat._util.foreign.foreign`.
        in_channels: channels of the images, at least 1.
        num_classes: number of logits, at least 1.
        image_size: (H, W), or one number for both; at least 8. Only ``lenet`` depends on it.

    Raises:
        ValueError: an unknown name, or a number that is too small.
        ImportError, TypeError: there is no such function, or it returns something else.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if is_foreign(name):
        model = foreign(name)(in_channels=in_channels, num_classes=num_classes, image_size=size)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: wanted an nn.Module of {name}, got {type(model).__name__}")
        return model
    if name not in (*names(), ENSEMBLE):
        raise unknown_name("model", name, names())
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if len(size) != 2 or min(size) < MIN_SIZE:
        raise ValueError(f"image_size must be (H, W), both at least {MIN_SIZE}, got {image_size}")
    if name == "lenet":
        return LeNet(in_channels, num_classes, (size[0], size[1]))
    if name == "resnet20":
        return ResNet20(in_channels, num_classes)
    if name == "vgg_small":
        return VGGSmall(in_channels, num_classes)
    if name == ENSEMBLE:
        return Ensemble(in_channels, num_classes)
    return MobileNetV2Small(in_channels, num_classes)
