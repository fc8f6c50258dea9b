"""Learn to detect misled answers on shadow victims, and drop them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat._util.settings import option
from divqat.attacks.answers import centred_logs, lowest, reading
from divqat.attacks.attack import Task
from divqat.attacks.residual import cross_fitted, ridge
from divqat.attacks.shadow import Shadow, as_released
from divqat.attacks.sift import decoy_likelihood
from divqat.data.batches import to_float
from divqat.nn.decoy import coarse_picture

WIDTH, EPOCHS, BATCH = 64, 20, 256  # of the detector


@dataclass(frozen=True, kw_only=True)
class DetectAndDrop(Shadow):
    """KnockoffNets on the answers that a detector takes for honest.

    Ours, against :class:`divqat.nn.MisdirectionLoss`, by a thief who knows all of it but its seed.
    The shadow victims are those of :class:`divqat.attacks.Shadow`, from labeled images. Of each
    query it is known whether a shadow's answer is misled: the defense changed its top class. A
    small network learns that, over all shadows, from what no seed decides: the logarithms of the
    answer in descending order, how well lights and shades explain the answer, linearly and by top
    class. The ``keep`` share of the victim's answers that are least likely misled is learned.

    Args:
        keep: this share of the queries, rounded, at least one.
        reading: what the clone learns of the answers that are kept; ``shuffled`` keeps the same
            queries with answers to others, a control.
    """

    keep: float = option(0.3, "Share of the answers to learn.", above=0, most=1)
    reading: str = option("as_given", "What the clone learns of an answer that is kept.")

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        stored = task.folder.load("kept.pt")
        if stored is None:
            misled = self._misled(task, images, as_released(answers, task.victim.answer))
            stored = {"rows": lowest(misled, self.keep)}
            task.folder.save("kept.pt", stored)
        rows = stored["rows"]
        return images[rows], reading(self.reading)(answers[rows])

    def _misled(self, task: Task, images: Tensor, answers: Tensor) -> Tensor:
        """How likely each answer is misled, as a logit: float32 [Q]."""
        generator = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (self.shadows,), generator=generator).tolist()
        inputs, labels = [], []
        for number, seed in enumerate(seeds):
            clean, defended = self._shadow(task, images, number, seed)
            inputs.append(signs(images, defended))
            labels.append((clean.argmax(1) != defended.argmax(1)).float())
        torch.manual_seed(self.seed)  # whatever the shadows drew
        return detector(torch.cat(inputs), torch.cat(labels))(signs(images, answers))


def signs(
    images: Tensor,  # uint8 [N, C, H, W]
    answers: Tensor,  # [N, num_classes]
) -> Tensor:  # float32 [N, num_classes + 2]
    """What tells a misled answer, and no seed decides; of each with mean 0 and variance 1 over the
    answers of a network."""
    logs = centred_logs(answers).double()
    shades = torch.cat([coarse_picture(to_float(part)) for part in images.split(4096)]).double()
    left = logs - cross_fitted(ridge, shades, logs)
    columns = [
        logs.sort(1, descending=True).values,
        decoy_likelihood(images, answers)[:, None],
        left.norm(dim=1, keepdim=True),
    ]
    found = torch.cat(columns, 1)
    return ((found - found.mean(0)) / found.std(0, unbiased=False).clamp(min=1e-6)).float()


def detector(inputs: Tensor, labels: Tensor) -> nn.Module:
    """A network from inputs [M, D] to logits [M], trained by the binary cross-entropy to labels [M]
    of 0 and 1, in eval mode."""
    network = nn.Sequential(
        nn.Linear(inputs.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1), nn.Flatten(0)
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return network.requires_grad_(False).eval()
