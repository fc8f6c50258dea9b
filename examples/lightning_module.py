"""Defend a model in PyTorch Lightning: python examples/lightning_module.py --out runs/lightning

The accuracy budget is in the checkpoints, so that ``--resume FILE`` continues the training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from digits import SEED, accuracy, deploy, small_cnn, splits, train_float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import divqat


class Defended(L.LightningModule):
    """A prepared model that learns its task and the decoy, within an accuracy budget."""

    def __init__(
        self,
        model: nn.Module,
        misdirection: divqat.nn.MisdirectionLoss,
        validation: TensorDataset,
        epochs: int,
        **budget: float,
    ) -> None:
        super().__init__()
        self.model, self.misdirection = model, misdirection  # the decoy is in the checkpoints, too
        self.validation, self.epochs, self.settings = validation, epochs, budget
        self.saved: dict[str, Any] | None = None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]

    def on_train_start(self) -> None:  # by now Lightning has restored a checkpoint
        self.budget = divqat.nn.AccuracyBudget(
            self.model, self.misdirection, lambda model: accuracy(model, self.validation),
            epochs=self.epochs, **self.settings,
            restore=[self.optimizers(use_pl_optimizer=False), self.lr_schedulers()],
        )  # fmt: skip
        if self.saved is not None:
            self.budget.load_state_dict(self.saved)

    def on_train_epoch_start(self) -> None:
        if self.budget.epoch == self.epochs - 1:  # going back undoes it
            divqat.freeze_observers(self.model)
            divqat.freeze_batchnorm(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        proxies = self.misdirection.draw(images)
        logits, foreign = self.model(torch.cat([images, proxies])).tensor_split([len(images)])
        return F.cross_entropy(logits, labels) + self.misdirection(foreign, proxies)

    def on_train_epoch_end(self) -> None:  # Lightning has stepped the schedule, but not saved yet
        self.budget.step()
        print(self.budget.message())
        self.trainer.should_stop = self.budget.finished

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["budget"] = self.budget.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["budget"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--points", type=float, default=2.0, help="accuracy that may be lost")
    parser.add_argument("--precision", default="32-true", help="for example bf16-mixed")
    parser.add_argument("--resume", help="a checkpoint of Lightning")
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    train, validation, test = splits()
    float_model = train_float(small_cnn(), train)
    loader = DataLoader(train, batch_size=64, shuffle=True)

    model = divqat.prepare(float_model, "x86", example_input=train.tensors[0][:8])
    misdirection = divqat.nn.MisdirectionLoss(loader, 10, seed=SEED, weight=0.8)
    reference = accuracy(float_model, validation)  # better: of a model from plain QAT
    module = Defended(
        model, misdirection, validation, options.epochs, reference=reference, points=options.points
    )
    checkpoints = L.pytorch.callbacks.ModelCheckpoint(options.out / "checkpoints", save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=-1,  # until the budget is finished
        precision=options.precision, accelerator="cpu", default_root_dir=options.out, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[checkpoints],
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=options.resume)
    return {**deploy(model, misdirection, test, options.out / "model.onnx"), "module": module}


if __name__ == "__main__":
    main()
