"""A replay memory of the images and answers that a clone has learned."""

from __future__ import annotations

import torch
from torch import Tensor

from divqat.attacks.folder import Folder
from divqat.data.batches import to_float, to_uint8


class Memory:
    """Batches of images and answers, on the CPU.

    Images are kept in 8 bits, a quarter of the space, with an error of at most 1/255. The space for
    all batches is reserved at once, but occupies no memory until it is used.

    Args:
        batches: capacity.
        batch_size: images per batch.
        shape: [C, H, W] of an image.
        classes: length of an answer.
    """

    def __init__(self, batches: int, batch_size: int, shape: tuple[int, ...], classes: int) -> None:
        self.images = torch.empty(batches, batch_size, *shape, dtype=torch.uint8)
        self.answers = torch.empty(batches, batch_size, classes)
        self.size = self.saved = 0  # in batches

    def add(self, images: Tensor, answers: Tensor) -> None:
        """Add float images [batch_size, C, H, W] in [-1, 1] and answers [batch_size, classes]."""
        self.images[self.size] = to_uint8(images)
        self.answers[self.size] = answers
        self.size += 1

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw ``count`` with replacement (torch's global generator): float images, answers."""
        rows = torch.randint(self.size * self.images.shape[1], (count,))
        return to_float(self.images.flatten(0, 1)[rows]), self.answers.flatten(0, 1)[rows]

    def save(self, folder: Folder) -> None:
        """Save the batches that are new since the last save in a separate file."""
        new = slice(self.saved, self.size)
        # Cloned, as torch.save writes the whole storage of a slice.
        state = {"images": self.images[new].clone(), "answers": self.answers[new].clone()}
        folder.save(f"memory-{self.saved}.pt", state)
        self.saved = self.size

    def load(self, folder: Folder, size: int) -> None:
        """Load the first ``size`` batches."""
        while self.size < size:
            state = folder.load(f"memory-{self.size}.pt")
            assert state is not None
            old = slice(self.size, self.size + len(state["images"]))
            self.images[old], self.answers[old] = state["images"], state["answers"]
            self.size = self.saved = old.stop
