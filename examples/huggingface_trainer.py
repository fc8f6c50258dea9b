"""Defend a model in Hugging Face's Trainer: python examples/huggingface_trainer.py --out runs/hf

Batches are dicts, the prepared model takes images and returns logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from digits import SEED, accuracy, deploy, small_cnn, splits, train_float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import divqat


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


class DefendingTrainer(Trainer):
    """A Trainer whose loss includes the misdirection."""

    misdirection: divqat.nn.MisdirectionLoss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        images, labels = inputs["images"], inputs["labels"]
        if model.training:
            proxies = self.misdirection.draw(images)
            logits, foreign = model(torch.cat([images, proxies])).tensor_split([len(images)])
            loss = F.cross_entropy(logits, labels) + self.misdirection(foreign, proxies)
        else:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


class BudgetCallback(TrainerCallback):
    """Steps the accuracy budget after every epoch, and saves it beside Trainer's checkpoints."""

    def __init__(self, budget: divqat.nn.AccuracyBudget, resume: str | None) -> None:
        self.budget, self.resume = budget, resume

    def on_train_begin(self, *_: Any, **__: Any) -> None:  # Trainer has restored its own state
        if self.resume is not None:
            self.budget.load_state_dict(torch.load(Path(self.resume) / "budget.pt"))

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        if self.budget.epoch == self.budget.epochs - 1:  # going back undoes it
            divqat.freeze_observers(self.budget.model)
            divqat.freeze_batchnorm(self.budget.model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.budget.step()
        print(self.budget.message())
        control.should_training_stop = self.budget.finished

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.budget.state_dict(), folder / "budget.pt")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/hf"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--points", type=float, default=2.0, help="accuracy that may be lost")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resume", help="a checkpoint of Trainer")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, validation, test = splits()
    float_model = train_float(small_cnn(), train)
    model = divqat.prepare(float_model, "x86", example_input=train.tensors[0][:8])
    misdirection = divqat.nn.MisdirectionLoss(DataLoader(train, 64), 10, seed=SEED, weight=0.8)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    batch = 64 // options.accumulate
    steps = options.epochs * -(-len(train) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # Trainer steps it
    reference = accuracy(float_model, validation)  # better: of a model from plain QAT
    budget = divqat.nn.AccuracyBudget(
        model, misdirection, lambda model: accuracy(model, validation), reference=reference,
        points=options.points, epochs=options.epochs, restore=[optimizer, schedule],
    )  # fmt: skip
    settings = TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=budget.longest,  # the callback stops it when the budget is finished
        per_device_train_batch_size=batch, per_device_eval_batch_size=300,
        gradient_accumulation_steps=options.accumulate, bf16=options.bf16, use_cpu=True,
        label_names=["labels"], remove_unused_columns=False, save_strategy="epoch",
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DefendingTrainer(
        model, settings, collate, train, validation, optimizers=(optimizer, schedule),
        callbacks=[BudgetCallback(budget, options.resume)],
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
    )  # fmt: skip
    trainer.misdirection = misdirection
    trainer.train(resume_from_checkpoint=options.resume)
    evaluated = trainer.evaluate()
    print(f"validation accuracy {evaluated['eval_accuracy']:.1%}")
    result = deploy(model, misdirection, test, options.out / "model.onnx")
    return {**result, "budget": budget, "evaluated": evaluated["eval_accuracy"]}


if __name__ == "__main__":
    main()
