"""The teacher's answers to the training images, computed once and kept in the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat.data import to_float
from divqat.files import load_checkpoint, save_checkpoint

FILE = "teacher_logits.pt"
BATCH = 512


def teacher_logits(
    folder: Path,
    teacher: nn.Module,
    images: Tensor,  # uint8 [N, C, H, W]
    key: Mapping[str, str],
    *,
    keep: bool = True,
) -> Tensor:  # float32 [N, num_classes], on the device of the images
    """Load the answers, or compute and write them.

    Args:
        folder: the run folder; the file is ``teacher_logits.pt``.
        teacher: in eval mode, on the device of ``images``.
        key: what else the answers depend on, say the teacher's fingerprint and the precision. With
            a digest of the images it is kept beside the answers; a file of another key, or a
            damaged one, is replaced.
        keep: write the file. Of several processes one does; the others read it if it is there.
    """
    wanted = {**key, "images": digest(images)}
    kept = _load(folder / FILE)
    if kept is not None and kept["key"] == wanted:
        return kept["logits"].to(images.device)
    with torch.inference_mode():
        chunks = [
            teacher(to_float(chunk).contiguous(memory_format=torch.channels_last)).float()
            for chunk in images.split(BATCH)
        ]
    # outside, so that it is an ordinary tensor, of which the backward pass may keep rows
    logits = torch.cat(chunks).clone()
    if keep:
        save_checkpoint(folder / FILE, {"key": wanted, "logits": logits.cpu()})
    return logits


def digest(images: Tensor) -> str:
    """16 hexadecimal digits that identify a tensor."""
    data = images.cpu().contiguous()
    found = hashlib.sha256(repr((list(data.shape), data.dtype)).encode())
    found.update(data.numpy().tobytes())
    return found.hexdigest()[:16]


def _load(file: Path) -> dict[str, Any] | None:
    try:
        kept = load_checkpoint(file)
    except (FileNotFoundError, ValueError):
        return None
    return kept if kept.keys() == {"key", "logits"} else None
