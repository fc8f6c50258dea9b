"""What the comparisons with deployed files share."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

AGREEMENT = 0.995  # of the decided images, at least
MARGIN = 2  # steps of the logits' grid that a decision must be away from a tie


def logit_step(logits: Tensor) -> float:
    """A step of the logits' grid: their range over 255."""
    return float(logits.max() - logits.min()) / 255


def decided(logits: Tensor) -> Tensor:  # [N, num_classes] -> bool [N]
    """Whether the two largest logits are more than ``MARGIN`` steps apart."""
    first, second = logits.topk(2).values.unbind(-1)
    return first - second > MARGIN * logit_step(logits)


def float_onnx(net: nn.Module, images: Tensor, path: Path) -> None:
    """Write a float network in eval mode as one ONNX file with a dynamic batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (images[:2],),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=20,
            external_data=False,
            verbose=False,
        )
