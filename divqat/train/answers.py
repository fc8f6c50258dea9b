"""The teacher's logits for the training images, computed once and cached in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.files import load_checkpoint, save_checkpoint
from divqat.data import LabeledImages, batches
from divqat.data.digest import digest

FILE = "teacher_logits.pt"
BATCH = 512


def teacher_logits(
    folder: Path,
    teacher: nn.Module,
    data: LabeledImages,
    key: Mapping[str, str],
    *,
    keep: bool = True,
) -> Tensor:  # float32 [N, num_classes], on the device of the images
    """Load the cached logits, or compute and write them.

    Args:
        folder: the run folder; the file is ``teacher_logits.pt``.
        teacher: in eval mode, on the device of ``data``.
        data: N images, not augmented.
        key: what else the logits depend on, such as the teacher's fingerprint and the precision. It
            is stored beside the logits, with a digest of the images; a file with another key, or a
            damaged one, is replaced.
        keep: write the file. Only one process should; the others read the file if it exists.
    """
    wanted = {**key, "images": digest(data)}
    cached = _load(folder / FILE)
    if cached is not None and cached["key"] == wanted:
        return cached["logits"].to(data.labels.device)
    with torch.inference_mode():
        chunks = [
            teacher(images.contiguous(memory_format=torch.channels_last)).float()
            for images, _ in batches(data, BATCH)
        ]
    # Outside inference_mode: autograd may save rows of an ordinary tensor, not of an inference one.
    logits = torch.cat(chunks).clone()
    if keep:
        save_checkpoint(folder / FILE, {"key": wanted, "logits": logits.cpu()})
    return logits


def _load(file: Path) -> dict[str, Any] | None:
    try:
        cached = load_checkpoint(file)
    except (FileNotFoundError, ValueError):
        return None
    return cached if cached.keys() == {"key", "logits"} else None
