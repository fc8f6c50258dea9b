"""What a clone learned earlier, to be learned again."""

from __future__ import annotations

import torch
from torch import Tensor

from divqat.attacks.folder import Folder
from divqat.data.batches import to_float, to_uint8


class Memory:
    """A batch of images and answers per round, on the CPU.

    Images are kept in 8 bits, a quarter of the space; they come back at most 1/255 from what was
    asked. The space for all rounds is reserved at once, but costs nothing until it is used.

    Args:
        rounds, batch_size: as many batches of so many images.
        shape: [C, H, W] of an image.
        classes: length of an answer.
    """

    def __init__(self, rounds: int, batch_size: int, shape: tuple[int, ...], classes: int) -> None:
        self.images = torch.empty(rounds, batch_size, *shape, dtype=torch.uint8)
        self.answers = torch.empty(rounds, batch_size, classes)
        self.rounds = self.saved = 0

    def add(self, images: Tensor, answers: Tensor) -> None:
        """Remember float images [batch_size, C, H, W] in [-1, 1] and answers."""
        self.images[self.rounds] = to_uint8(images)
        self.answers[self.rounds] = answers
        self.rounds += 1

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` of all, with replacement (torch's global generator): float images, answers."""
        rows = torch.randint(self.rounds * self.images.shape[1], (count,))
        return to_float(self.images.flatten(0, 1)[rows]), self.answers.flatten(0, 1)[rows]

    def save(self, folder: Folder) -> None:
        """Keep what is new since the last time, in a file of its own."""
        new = slice(self.saved, self.rounds)
        # Cloned, as torch.save writes all of what a slice is a part of.
        state = {"images": self.images[new].clone(), "answers": self.answers[new].clone()}
        folder.save(f"memory-{self.saved}.pt", state)
        self.saved = self.rounds

    def load(self, folder: Folder, rounds: int) -> None:
        """Get what was kept of the first ``rounds`` rounds."""
        while self.rounds < rounds:
            state = folder.load(f"memory-{self.rounds}.pt")
            assert state is not None
            old = slice(self.rounds, self.rounds + len(state["images"]))
            self.images[old], self.answers[old] = state["images"], state["answers"]
            self.rounds = self.saved = old.stop
