"""Networks of torchvision and timm with random weights, and pictures that give them sane ranges."""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INSTALL = "pip install --no-deps -r requirements-networks.txt"
# Of the classes: the corners of a cube, its center and another blue.
COLORS = [*product((-1.0, 1.0), repeat=3), (0.0, 0.0, 0.0), (0.0, 0.0, 1.5)]
CLASSES = len(COLORS)
CELLS = (3, 7, 15, 31, 63)  # of the pictures' noise, along a side
PENALTY = 3.0  # of the fit, in mean squares of its inputs


@dataclass(frozen=True)
class Architecture:
    """A network of a library.

    Attributes:
        library: ``torchvision`` or ``timm``.
        size: height and width of its pictures.
        options: for its builder.
    """

    library: str
    size: int = 224
    options: tuple[tuple[str, Any], ...] = ()


_INCEPTION = (("init_weights", False), ("aux_logits", True), ("transform_input", False))
NETWORKS = {
    **dict.fromkeys(
        (
            *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0"),
            *("densenet121", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf"),
            *("squeezenet1_1", "mnasnet1_0", "vit_b_16", "swin_t"),
        ),
        Architecture("torchvision"),
    ),
    "googlenet": Architecture("torchvision", options=_INCEPTION),
    "inception_v3": Architecture("torchvision", size=299, options=_INCEPTION),
    "lraspp_mobilenet_v3_large": Architecture("torchvision", options=(("weights_backbone", None),)),
    **dict.fromkeys(
        (
            *("mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_lite0"),
            *("regnetx_002", "repvgg_a0", "resnetv2_50", "cspresnet50", "mobileone_s0"),
            *("edgenext_small", "convnext_atto", "levit_128s", "deit_tiny_patch16_224"),
        ),
        Architecture("timm"),
    ),
    "fastvit_t8": Architecture("timm", size=256),
}
# Those that also train with Inductor, in two processes, in bfloat16 and with saved codes: minutes.
TRAINED = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "deit_tiny_patch16_224")


def missing() -> list[str]:
    """The libraries of the networks that cannot be imported, with the reasons."""
    reasons = []
    for name, load in (("torchvision", _torchvision), ("timm", _timm)):
        try:
            load()
        except (ImportError, RuntimeError, OSError) as error:
            reasons.append(f"{name} ({error})")
    return reasons


def versions() -> dict[str, str]:
    """The versions of its libraries."""
    return {name: metadata.version(name) for name in ("torchvision", "timm")}


def build(name: str, seed: int) -> nn.Module:
    """A network with random weights, in eval mode.

    A deep network of independent random weights amplifies every rounding error, and its pictures
    end up alike; trained ones do neither. So BatchNorms get biases around 1, with which most units
    are active, and depthwise kernels are random around the identity. BatchNorms get weights around
    1, as some networks start with zeros, and layer scales get 0.1: with their first value of 1e-6
    the blocks would have no effect.
    """
    entry = NETWORKS[name]
    options = dict(entry.options) | {"num_classes": CLASSES}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if entry.library == "timm":
            model = _timm().create_model(name, pretrained=False, **options)
        else:
            model = _torchvision().models.get_model(name, weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            with torch.no_grad():
                nn.init.dirac_(module.weight, module.groups)
                module.weight += 0.1 * torch.randn_like(module.weight)
    for parameter in model.parameters():
        values = parameter.detach()
        if parameter.dim() and values.numel() > 1 and 0 < values.abs().max() <= 1e-4:
            nn.init.constant_(parameter, 0.1)
    return model.eval()


def pictures(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, size, size] around 0, and their classes [N].

    Each is smooth noise at five scales. A class has a color and a contrast at each scale, which
    random features tell apart wherever they look, so that most decisions are clear.
    """
    labels = torch.arange(count) % CLASSES
    of_class = torch.Generator().manual_seed(731)
    casts = 1.2 * torch.tensor(COLORS)[:, :, None, None]
    contrasts = 0.2 + torch.rand(CLASSES, len(CELLS), generator=of_class) ** 2
    own = torch.Generator().manual_seed(seed)
    result = torch.empty(count, 3, size, size)
    for start in range(0, count, 50):
        part = slice(start, min(start + 50, count))
        kind = labels[part]
        n = len(kind)
        images = 0.3 * _noise(contrasts[kind], size, 1000 * seed + start)
        contrast = 0.8 + 0.2 * torch.rand(n, 1, 1, 1, generator=own)
        cast = casts[kind] + 0.05 * torch.randn(n, 3, 1, 1, generator=own)
        result[part] = (images * contrast + cast).clamp(-2.2, 2.6)
    return result, labels


def nudged(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of about 1, moved by a millionth."""
    return images + 1e-6 * torch.randn(images.shape, generator=generator)


def _noise(contrasts: Tensor, size: int, seed: int) -> Tensor:
    """Noise [N, 3, size, size] of the contrasts [N, scales]."""
    n = len(contrasts)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(n, 3, size, size)
    for cells, contrast in zip(CELLS, contrasts.T, strict=True):
        gray = torch.randn(n, 1, cells, cells, generator=generator)
        color = torch.randn(n, 3, cells, cells, generator=generator)
        octave = F.interpolate(gray + 0.5 * color, (size, size), mode="bicubic")
        total += octave * contrast[:, None, None, None]
    return total


@torch.no_grad()
def settle(model: nn.Module, images: Tensor, batch: int = 8) -> None:
    """Set the statistics of every BatchNorm to the mean over batches; the rest is in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative
        norm.train()
    for part in images.split(batch):
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def fit(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 8) -> None:
    """Fit the last layers by ridge regression to ±1 for each class, on the means of their inputs.

    These are the layers with ``CLASSES`` outputs that run in eval mode.
    """
    inputs: dict[nn.Module, list[Tensor]] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(layer, nn.Conv2d):
            x = x.mean((2, 3))
        inputs.setdefault(layer, []).append(x.flatten(0, -2))

    handles = [
        layer.register_forward_pre_hook(record)
        for layer in model.modules()
        if CLASSES in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
    ]
    for part in images.split(batch):
        model(part)
    for handle in handles:
        handle.remove()
    targets = 2.0 * F.one_hot(labels, CLASSES) - 1
    for layer, parts in inputs.items():
        x = torch.cat(parts).double()
        mean, center = x.mean(0), targets.double().mean(0)
        x = x - mean
        gram = x @ x.T  # [N, N]; there may be more features than pictures
        gram += PENALTY * gram.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)
        weight = (x.T @ torch.linalg.solve(gram, targets.double() - center)).T
        layer.weight.copy_(weight.view_as(layer.weight))  # type: ignore[operator,union-attr]
        if layer.bias is not None:
            layer.bias.copy_(center - weight @ mean)  # type: ignore[operator,union-attr]


def tensor_of(output: Any) -> Tensor:
    """The logits of an output: itself, its ``out``, or its first entry."""
    if isinstance(output, dict):
        return output["out"]
    return output if isinstance(output, Tensor) else output[0]


@cache
def _torchvision() -> Any:
    """torchvision; also PyPI's wheel on a CPU-only torch, where its own operators do not load.

    Its import then fails at operators for detection, which nothing here needs, unless they have a
    schema.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    for name in ("nms", "qnms"):
        _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


def _timm() -> Any:
    _torchvision()  # which timm imports
    return importlib.import_module("timm")


_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
