"""Defend a model of timm, as its train.py trains it: python examples/timm_loop.py --out runs/timm

With timm's model, optimizer, schedule, mixup and average of the weights, which is deployed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from digits import SEED, accuracy, deploy, splits, train_float
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import divqat


def enlarged(data: TensorDataset) -> TensorDataset:
    """32×32 pixels, as the networks of timm reduce the resolution by 32."""
    images, labels = data.tensors
    return TensorDataset(images.repeat_interleave(4, 2).repeat_interleave(4, 3), labels)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/timm"))
    parser.add_argument("--model", default="test_resnet", help="a CNN of timm")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--points", type=float, default=3.0, help="accuracy that may be lost")
    parser.add_argument("--mixup", type=float, default=0.1, help="alpha; 0: off")
    parser.add_argument("--decay", type=float, default=0.9, help="of the average, per step")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, validation, test = (enlarged(data) for data in splits())
    float_model = train_float(timm.create_model(options.model, in_chans=1, num_classes=10), train)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    model = divqat.prepare(float_model, "x86", example_input=train.tensors[0][:8])
    # fitted to images that are not mixed
    misdirection = divqat.nn.MisdirectionLoss(loader, 10, seed=SEED, weight=0.8)

    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=options.epochs, warmup_epochs=1, warmup_lr=1e-4
    )
    mixup = Mixup(options.mixup, num_classes=10, label_smoothing=0.0) if options.mixup else None
    loss_fn = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss()
    # The average copies the ranges and which quantizers have one: observe them before it is made.
    divqat.quantize.observe_first(model, [next(iter(loader))[0]])
    average = ModelEmaV3(model, decay=options.decay)
    budget = divqat.nn.AccuracyBudget(
        average.module, misdirection, lambda model: accuracy(model, validation),
        reference=accuracy(float_model, validation),  # better: of a model from plain QAT
        points=options.points, epochs=options.epochs, restore=[model, optimizer, schedule],
    )  # fmt: skip
    model.train()
    while not budget.finished:
        schedule.step(budget.epoch)
        if budget.epoch == options.epochs - 1:  # going back undoes it
            divqat.freeze_observers(model)
            divqat.freeze_batchnorm(model)
        for images, labels in loader:
            proxies = misdirection.draw(images)
            if mixup:
                images, labels = mixup(images, labels)  # labels become soft
            logits, foreign = model(torch.cat([images, proxies])).tensor_split([len(images)])
            loss = loss_fn(logits, labels) + misdirection(foreign, proxies)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        budget.step()
        print(budget.message())
    options.out.mkdir(parents=True, exist_ok=True)
    result = deploy(average.module, misdirection, test, options.out / "model.onnx")
    return {**result, "budget": budget}


if __name__ == "__main__":
    main()
