"""Defend a model in a loop with accelerate: python examples/accelerate_loop.py --out runs/here

In two processes: torchrun --nproc-per-node 2 examples/accelerate_loop.py --out runs/here
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from digits import SEED, accuracy, deploy, small_cnn, splits, train_float
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import divqat


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--points", type=float, default=2.0, help="accuracy that may be lost")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--precision", default="no", help="for example bf16")
    options = parser.parse_args(arguments)
    accelerator = Accelerator(
        cpu=True, mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate
    )
    set_seed(0)  # the same float model and decoy in every process
    train, validation, test = splits()
    float_model = train_float(small_cnn(), train)
    model = divqat.prepare(float_model, "x86", example_input=train.tensors[0][:8])
    misdirection = divqat.nn.MisdirectionLoss(DataLoader(train, 64), 10, seed=SEED, weight=0.8)
    misdirection.to(accelerator.device)
    set_seed(1, device_specific=True)  # other proxies in every process

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    # stepped once per epoch, and so not prepared: accelerate would step it once per process
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    batch = 64 // accelerator.num_processes // options.accumulate
    loader = DataLoader(train, batch, shuffle=True)
    net, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def validate(model: nn.Module) -> float:
        # BatchNorm's statistics and the ranges differ between processes, but all of them have to
        # take the same decisions: those of the first one, whose model is deployed.
        found = [accuracy(model.to(accelerator.device), validation)]
        return float(broadcast_object_list(found)[0])

    budget = divqat.nn.AccuracyBudget(
        model, misdirection, validate, epochs=options.epochs, points=options.points,
        reference=accuracy(float_model, validation),  # better: of a model from plain QAT
        restore=[optimizer, schedule],
    )  # fmt: skip
    while not budget.finished:
        if budget.epoch == options.epochs - 1:  # going back undoes it
            divqat.freeze_observers(model)
            divqat.freeze_batchnorm(model)
        for images, labels in loader:
            with accelerator.accumulate(net):
                proxies = misdirection.draw(images)
                logits, foreign = net(torch.cat([images, proxies])).tensor_split([len(images)])
                loss = F.cross_entropy(logits, labels) + misdirection(foreign, proxies)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        budget.step()
        accelerator.print(budget.message())
    result: dict[str, Any] = {"budget": budget}
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        result |= deploy(model.cpu(), misdirection.cpu(), test, options.out / "model.onnx")
    accelerator.end_training()
    return result


if __name__ == "__main__":
    main()
