"""The teacher's answers to the training images, computed once and kept in the run folder."""

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
    """Load the answers, or compute and write them.

    Args:
        folder: the run folder; the file is ``teacher_logits.pt``.
        teacher: in eval mode, on the device of ``data``, [N] images.
        key: what else the answers depend on, say the teacher's fingerprint and the precision. With
            a digest of the images it is kept beside the answers; a file of another key, or a
            damaged one, is replaced.
        keep: write the file. Of several processes one does; the others read it if it is there.
    """
    wanted = {**key, "images": digest(data)}
    kept = _load(folder / FILE)
    if kept is not None and kept["key"] == wanted:
        return kept["logits"].to(data.labels.device)
    with torch.inference_mode():
        chunks = [
            teacher(images.contiguous(memory_format=torch.channels_last)).float()
            for images, _ in batches(data, BATCH)
        ]
    # outside, so that it is an ordinary tensor, of which the backward pass may keep rows
    logits = torch.cat(chunks).clone()
    if keep:
        save_checkpoint(folder / FILE, {"key": wanted, "logits": logits.cpu()})
    return logits


def _load(file: Path) -> dict[str, Any] | None:
    try:
        kept = load_checkpoint(file)
    except (FileNotFoundError, ValueError):
        return None
    return kept if kept.keys() == {"key", "logits"} else None
