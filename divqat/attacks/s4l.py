"""Self-supervised semi-supervised learning: the clone also predicts the rotation of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat._util.settings import ConfigError, option
from divqat.attacks.attack import Task
from divqat.attacks.controlled import Draws, SemiSupervised, shifted, without_labels
from divqat.attacks.inner import trace
from divqat.attacks.training import Loss
from divqat.data.batches import to_float

ROTATIONS = 4  # by 0, 90, 180 and 270 degrees


@dataclass(frozen=True, kw_only=True)
class S4L(SemiSupervised):
    """Train on the answers and, with and without answers, on predicting the rotation of an image.

    S4L-Rotation of Zhai, Oliver, Kolesnikov, Beyer, "S4L: Self-Supervised Semi-Supervised
    Learning" (ICCV 2019, section 3), used for extraction by Jagielski et al., "High Accuracy and
    High Fidelity Extraction of Neural Networks" (USENIX Security 2020), and in the evaluation of
    ModelGuard (Tang et al., USENIX Security 2024):

        L = -sum_k t_k log softmax(f(x))_k + weight/4 sum_r -log softmax(h(g(turn_r(x))))_r

    g is the input of the clone's last linear or convolutional layer, averaged over the pixels if it
    is a feature map, and h a linear layer that is trained with the clone and then dropped. The
    first term is the mean over the queried images, the second over these and as many others.
    Rotated images are not queries: the victim's answers to them are unknown, so the first term
    leaves them out. All images go through the clone in one batch and share its batch statistics.

    With ``labels`` the thief owns labeled images, see :class:`LabeledAttack`: as many as a step has
    queried ones join both means, in the first with their labels as targets, in a sum with that of
    the answers. With ``victim=false`` as well they are all that names a class: the control.

    Deviations: ModelGuard's code rotates only the queried images, as with ``unlabeled=False``, and
    in separate batches. The paper uses mini-batches of labeled and of unlabeled images of equal
    size, as here.

    Raises:
        ConfigError: neither answers nor labels.
        ValueError: the images are not square, or the clone's last linear or convolutional layer
            does not give the logits.
    """

    weight: float = option(1.0, "Weight of the rotation loss.", least=0)
    unlabeled: bool = option(True, "Also rotate images of the query set that are not queried.")
    labels: bool = option(False, "Also learn labeled images of the victim's kind.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.victim or self.labels):
            raise ConfigError(
                "victim: wanted true, or labels=true, as nothing else names a class, got false"
            )

    @property
    def owns(self) -> bool:
        return self.labels

    def _loss(self, task: Task) -> Loss:
        height, width = task.query_set.shape[2:]
        if height != width:
            raise ValueError(f"query_set: wanted square images to rotate, got {height}x{width}")
        rest = torch.full((len(task.query_set),), self.unlabeled)
        rest[self._draw(task, torch.Generator().manual_seed(self.seed))] = False
        layer, size = _last_layer(task)
        owned = self._labeled(task) if self.labels else without_labels(task.query_set[:0])
        labeled, unlabeled = Draws(task, owned), Draws(task, without_labels(task.query_set[rest]))
        return _RotationLoss(self, layer, size, labeled, unlabeled).to(task.device)


class _RotationLoss(nn.Module):
    def __init__(
        self, attack: S4L, layer: str, size: int, labeled: Draws, unlabeled: Draws
    ) -> None:
        super().__init__()
        self.attack, self.layer = attack, layer
        self.labeled, self.unlabeled = labeled, unlabeled
        self.head = nn.Linear(size, ROTATIONS)

    def forward(self, clone: nn.Module, images: Tensor, targets: Tensor, done: float) -> Tensor:
        asked = len(images)
        (known, labels), (more, _) = self.labeled(asked), self.unlabeled(asked)
        upright = torch.cat([images, *map(self._moved, (known, more))])
        rotated = torch.cat([upright.rot90(turns, (2, 3)) for turns in range(ROTATIONS)])
        rotations = torch.arange(ROTATIONS, device=images.device).repeat_interleave(len(upright))
        logits, activations = trace(clone, [self.layer], rotated)
        predictions = self.head(_vectors(activations[self.layer][0]))  # [4 * len(upright), 4]
        loss = F.cross_entropy(logits[:asked], targets)
        if len(known):
            loss = loss + F.cross_entropy(logits[asked : asked + len(known)], labels)
        return loss + self.attack.weight * F.cross_entropy(predictions, rotations)

    def _moved(self, images: Tensor) -> Tensor:  # uint8 to float [N, C, H, W]
        return to_float(shifted(images, self.attack.pad, self.attack.flip))


def _last_layer(task: Task) -> tuple[str, int]:
    """The name of the layer that gives the logits, and the length of its input features."""
    types = (nn.Linear, nn.Conv2d)
    names = [name for name, layer in task.clone.named_modules() if isinstance(layer, types)]
    with torch.no_grad():
        image = to_float(task.query_set[:1]).to(task.device)
        logits, activations = trace(task.clone, names, image)
    name, (features, output) = next(reversed(activations.items()), ("", (image, image)))
    if not activations or output.shape[1] != logits.shape[1]:
        raise ValueError(
            f"clone: wanted a last linear or convolutional layer that gives the {task.classes} "
            f"logits, got {name or 'none'}"
        )
    return name, _vectors(features).shape[1]


def _vectors(features: Tensor) -> Tensor:  # [N, D] or [N, D, H, W] -> [N, D]
    return features if features.dim() == 2 else features.mean((2, 3))
