"""Train a network that a defense needs beside the victim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from divqat._util.progress import progress
from divqat._util.seeds import derived_seed
from divqat.data.batches import batches, steps_of
from divqat.defenses.defense import Owner


def train_network(
    owner: Owner,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
) -> nn.Module:
    """A network of the owner's that has learned the owner's training set from scratch.

    SGD with Nesterov momentum 0.9 and weight decay 5e-4, the learning rate falling to 0 along a
    cosine, step by step. Initial weights, order and dropout follow from ``owner.seed``; the global
    generators are left as they were.

    Args:
        owner: whose ``build`` makes the network, and decides on the device.
        loss: from logits [B, num_classes] and labels int64 [B] to a mean [].
        epochs, batch_size, lr: of the training; nothing is learned in 0 epochs.

    Returns:
        The network in eval mode.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    # Not the owner's seed itself: a clone made with the same one would begin with these weights.
    seed = derived_seed(owner.seed, "defense")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = owner.build().train()
        device = next(network.parameters()).device
        optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        steps, drop_last = steps_of(len(owner.train), batch_size)
        schedule = CosineAnnealingLR(optimizer, epochs * steps)
        for epoch in range(epochs):
            total = torch.zeros((), device=device)
            loader = batches(owner.train, batch_size, generator=generator, drop_last=drop_last)
            name = f"defense {epoch + 1}/{epochs}"
            for images, labels in progress(loader, name, total=steps, unit="batch"):
                value = loss(network(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                total += value.detach()
            if not total.isfinite():
                raise FloatingPointError(
                    f"the defense's loss is {total.item()} in epoch {epoch + 1}; lower lr ({lr})"
                )
    return network.eval()
