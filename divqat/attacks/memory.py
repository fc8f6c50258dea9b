"""What a clone learned earlier, to be learned again."""

from __future__ import annotations

import torch
from torch import Tensor

from divqat.attacks.folder import Folder
from divqat.data.batches import to_float, to_uint8


class Memory:
    """Batches of images and answers, on the CPU.

    Images are kept in 8 bits, a quarter of the space; they come back at most 1/255 from what was
    asked. The space for all batches is reserved at once, but costs nothing until it is used.

    Args:
        batches, batch_size: as many batches of so many images.
        shape: [C, H, W] of an image.
        classes: length of an answer.
    """

    def __init__(self, batches: int, batch_size: int, shape: tuple[int, ...], classes: int) -> None:
        self.images = torch.empty(batches, batch_size, *shape, dtype=torch.uint8)
        self.answers = torch.empty(batches, batch_size, classes)
        self.size = self.saved = 0  # in batches

    def add(self, images: Tensor, answers: Tensor) -> None:
        """Remember float images [batch_size, C, H, W] in [-1, 1] and answers."""
        self.images[self.size] = to_uint8(images)
        self.answers[self.size] = answers
        self.size += 1

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` of all, with replacement (torch's global generator): float images, answers."""
        rows = torch.randint(self.size * self.images.shape[1], (count,))
        return to_float(self.images.flatten(0, 1)[rows]), self.answers.flatten(0, 1)[rows]

    def save(self, folder: Folder) -> None:
        """Keep what is new since the last time, in a file of its own."""
        new = slice(self.saved, self.size)
        # Cloned, as torch.save writes all of what a slice is a part of.
        state = {"images": self.images[new].clone(), "answers": self.answers[new].clone()}
        folder.save(f"memory-{self.saved}.pt", state)
        self.saved = self.size

    def load(self, folder: Folder, size: int) -> None:
        """Get what was kept of the first ``size`` batches."""
        while self.size < size:
            state = folder.load(f"memory-{self.size}.pt")
            assert state is not None
            old = slice(self.size, self.size + len(state["images"]))
            self.images[old], self.answers[old] = state["images"], state["answers"]
            self.size = self.saved = old.stop
