"""Train a network that a defense needs besides the victim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from divqat._util.progress import progress
from divqat._util.seeds import derived_seed
from divqat.data.batches import batches, steps_per_epoch
from divqat.defenses.defense import Owner


def train_network(
    owner: Owner,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
) -> nn.Module:
    """Train a network of the owner from scratch on the owner's training set.

    SGD with Nesterov momentum 0.9 and weight decay 5e-4; in every step the learning rate follows a
    cosine to 0. Initial weights, order and dropout depend on ``owner.seed``; the state of the
    global generators is restored.

    Args:
        owner: its ``build`` creates the network, on the device for training.
        loss: from logits [B, num_classes] and labels int64 [B] to a mean [].
        epochs, batch_size, lr: of the training; with 0 epochs nothing is learned.

    Returns:
        The network in eval mode.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    # Not the owner's seed itself: a clone with the same seed would start from these weights.
    seed = derived_seed(owner.seed, "defense")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = owner.build().train()
        device = next(network.parameters()).device
        optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        steps, drop_last = steps_per_epoch(len(owner.train), batch_size)
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
