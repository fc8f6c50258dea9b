"""From the host's memory to a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; itself if it is there.

    A copy to a GPU from ordinary memory waits until the GPU has done all that it was given. One
    from pinned memory is put in its queue like a kernel, and the host goes on.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
