"""What the examples share: handwritten digits, a small CNN, its float training, the deployed file.

Images are float32 [N, 1, 8, 8] from -1 to 1, labels int64 [N].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import divqat
from divqat.export import export_onnx
from divqat.victim.runners import logits_function

SEED = 731  # choose your own, and keep it secret: it reveals much of the decoy


def splits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """1,197 images to train, 300 to validate, 300 to test."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.split([1197, 300, 300])
    classes = torch.from_numpy(labels).long()
    train, validation, test = (TensorDataset(images[part], classes[part]) for part in parts)
    return train, validation, test


def small_cnn() -> nn.Module:
    """From [N, 1, 8, 8] to logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip


def train_float(model: nn.Module, train: TensorDataset, epochs: int = 5) -> nn.Module:
    """Stands for the training that you already have; ``model`` is in eval mode afterwards."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """From 0 to 1, of a model in eval mode."""
    images, labels = data.tensors
    logits = torch.cat([model(part) for part in images.split(256)])
    return float((logits.argmax(1) == labels).double().mean())


@torch.no_grad()
def deploy(
    model: nn.Module, misdirection: divqat.nn.MisdirectionLoss, test: TensorDataset, path: Path
) -> dict[str, Any]:
    """Export a prepared model and print how the file behaves in ONNX Runtime.

    Returns:
        Shares from 0 to 1: ``accuracy`` of the file on ``test``, its ``agreement`` with the model,
        and the share of proxies to which it gives the decoy's answer, ``misled``.
    """
    model.eval()
    images, labels = test.tensors
    export_onnx(model, images[:1], path)
    run = logits_function(path)
    logits = run(images)
    proxies = misdirection.draw(images)
    misdirection(run(proxies), proxies)
    assert misdirection.misled is not None
    result = {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "agreement": float((logits.argmax(1) == model(images).argmax(1)).float().mean()),
        "misled": float(misdirection.misled),
    }
    print(
        f"{path}: accuracy {result['accuracy']:.1%}, the same answer as the trained model for "
        f"{result['agreement']:.1%}, {result['misled']:.1%} of the proxies misled"
    )
    return result
