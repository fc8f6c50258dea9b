"""Train a clone on a transfer set, resumable after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat._util.progress import progress
from divqat.attacks.attack import Attack, Task
from divqat.attacks.clone_settings import CloneSettings
from divqat.data.batches import augment, batches, steps_per_epoch
from divqat.data.sets import ImageSet

# loss(clone, images [B, C, H, W], targets [B, num_classes], finished share of the training) -> []
Loss = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


def soft_cross_entropy(clone: nn.Module, images: Tensor, targets: Tensor, done: float) -> Tensor:
    """-sum_k t_k log softmax(f(x))_k, mean over the images."""
    return F.cross_entropy(clone(images), targets)


@dataclass(frozen=True, kw_only=True)
class TransferAttack(CloneSettings, Attack):
    """An attack whose clone learns a fixed transfer set of images and answers.

    SGD with Nesterov momentum; in every step the learning rate follows a cosine to 0.
    """


class Training:
    """The training of the task's clone. Create it before the first query, so that a resumed run
    starts from the same weights.

    Args:
        attack: epochs, learning rate and so on.
        task: the clone, and the folder of its checkpoint.
        seeds: one per epoch, for the order of the batches, augmentation and dropout.
        name: of the checkpoint.
        head: a module of the loss that trains together with the clone.
    """

    def __init__(
        self,
        attack: TransferAttack,
        task: Task,
        seeds: list[int],
        *,
        name: str = "clone.pt",
        head: nn.Module | None = None,
    ) -> None:
        self.attack, self.task, self.seeds, self.name = attack, task, seeds, name
        self.modules = nn.ModuleList([task.clone] if head is None else [task.clone, head])
        self.optimizer = sgd(self.modules, attack)
        state = task.folder.load(name)
        if state is None:
            self.epoch = 0
            self._save()
        else:
            self.epoch = state["epoch"]
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])

    def run(
        self,
        images: Tensor,  # uint8 [N, C, H, W]
        targets: Tensor,  # float32 [N, num_classes], rows of sum 1
        loss: Loss = soft_cross_entropy,
    ) -> nn.Module:
        """Run the remaining epochs; returns the clone in eval mode.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        device = self.task.device
        data = ImageSet(images.to(device), torch.arange(len(images), device=device))
        targets = targets.to(device)
        while self.epoch < len(self.seeds):
            self._run_epoch(data, targets, loss)
            self.epoch += 1
            self.task.watch(self.task.clone.eval(), self.epoch)
            self._save()
        return self.task.clone.eval()

    def _run_epoch(self, data: ImageSet, targets: Tensor, loss: Loss) -> None:
        attack, seed, clone = self.attack, self.seeds[self.epoch], self.task.clone
        torch.manual_seed(seed)  # dropout
        steps, drop_last = steps_per_epoch(len(data), attack.batch_size)
        loader = batches(
            data,
            attack.batch_size,
            generator=torch.Generator().manual_seed(seed),
            augment=partial(augment, pad=attack.pad, flip=attack.flip),
            drop_last=drop_last,
        )
        self.modules.train()
        total = torch.zeros((), device=targets.device)
        name = f"clone {self.epoch + 1}/{len(self.seeds)}"
        for step, (x, index) in enumerate(progress(loader, name, total=steps, unit="batch")):
            done = (self.epoch + step / steps) / len(self.seeds)
            # lr_t = lr / 2 * (1 + cos(pi * t / T))
            set_lr(self.optimizer, attack.lr / 2 * (1 + math.cos(math.pi * done)))
            with autocast(attack, x.device):
                value = loss(clone, x, targets[index], done)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            total += value.detach()
        if not total.isfinite():
            raise FloatingPointError(
                f"the clone's loss is {total.item()} in epoch {self.epoch + 1}; "
                f"lower lr ({attack.lr})"
            )

    def _save(self) -> None:
        self.task.folder.save(
            self.name,
            {
                "epoch": self.epoch,
                "modules": self.modules.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )


def sgd(modules: nn.Module, attack: Attack) -> torch.optim.SGD:
    """The optimizer of every clone."""
    return torch.optim.SGD(
        modules.parameters(),
        lr=attack.lr,
        momentum=attack.momentum,
        nesterov=attack.momentum > 0,
        weight_decay=attack.weight_decay,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def autocast(attack: Attack, device: torch.device) -> Any:
    """The autocast context of the attack's precision; disabled for float32."""
    enabled = attack.precision != "float32"
    dtype = getattr(torch, attack.precision) if enabled else None
    return torch.autocast(device.type, dtype, enabled)
