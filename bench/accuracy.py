"""``python -m bench accuracy``: what speed costs in accuracy, on Fashion-MNIST.

Full precision, then plain QAT from its weights. Accuracies are those on the test set after the last
epoch; learning rates were chosen on the validation split of seed 0. A stopped run goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.command import Row, add_common_arguments, matches, measured, set_up
from divqat.train import TrainConfig, train

COMMON = dict(dataset="fashion-mnist", model="vgg_small", batch_size=128, pad=2, flip=True)
FP = dict(epochs=6, lr=0.1, schedule="one-cycle")
QAT = dict(epochs=3, lr=0.005, weight_bits=8)  # of the published results
LENET = dict(model="lenet")  # float16, which CPUs multiply slowly, takes too long with more
BFLOAT16, FLOAT16 = dict(precision="bfloat16"), dict(precision="float16")
LARGE = dict(batch_size=1024, base_batch_size=128)
LINEAR = dict(LARGE, lr_scaling="linear")
VGG_SMALL, LENET_NAME = "VGG-small", "LeNet"


@dataclass(frozen=True)
class Variant:
    """Other settings than ``FP`` and ``QAT``, each after ``COMMON``; ``base`` is compared with."""

    base: str
    fp: dict[str, Any] = field(default_factory=dict)
    qat: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    VGG_SMALL: Variant(VGG_SMALL),
    "VGG-small, bfloat16": Variant(VGG_SMALL, BFLOAT16, BFLOAT16),
    "VGG-small, QAT with batch 1024": Variant(VGG_SMALL, qat=dict(LINEAR, lr_warmup_epochs=0.5)),
    "VGG-small, QAT with batch 1024, LARS": Variant(
        VGG_SMALL, qat=dict(LARGE, lr_warmup_epochs=0.5, optimizer="lars", lr=0.2)
    ),
    "VGG-small, QAT with batch 1024, LAMB": Variant(
        VGG_SMALL, qat=dict(LARGE, lr_warmup_epochs=0.5, optimizer="lamb", lr=0.001)
    ),
    "VGG-small, both with batch 1024": Variant(
        VGG_SMALL, dict(LINEAR, lr_warmup_epochs=2), dict(LINEAR, lr_warmup_epochs=0.5)
    ),
    "VGG-small, both with batch 1024, 10 epochs before QAT": Variant(
        VGG_SMALL, dict(LINEAR, lr_warmup_epochs=2, epochs=10), dict(LINEAR, lr_warmup_epochs=0.5)
    ),
    "VGG-small, both with batch 1024, 10 epochs before QAT, square root": Variant(
        VGG_SMALL,
        dict(LINEAR, lr_warmup_epochs=2, epochs=10),
        dict(LARGE, lr_scaling="sqrt", lr_warmup_epochs=0.5),
    ),
    LENET_NAME: Variant(LENET_NAME, LENET, LENET),
    "LeNet, bfloat16": Variant(LENET_NAME, LENET | BFLOAT16, LENET | BFLOAT16),
    "LeNet, float16": Variant(LENET_NAME, LENET | FLOAT16, LENET | FLOAT16),
}
MEASURED = ("test_accuracy", "validation_accuracy", "seconds", "waiting", "peak_memory")


def trained(name: str, seed: int, device: str, threads: int | None, folder: Path) -> Row:
    """Both trainings of a variant; one in full precision serves all variants that share it."""
    variant = VARIANTS[name]
    first = next(other for other, its in VARIANTS.items() if its.fp == variant.fp)
    fp, qat = (folder / title.replace(", ", "-").replace(" ", "-") / f"seed{seed}" / method
               for title, method in ((first, "fp"), (name, "qat")))  # fmt: skip
    row: Row = {"variant": name, "seed": seed}
    for method, settings, out in (
        ("fp", FP | variant.fp, fp),
        ("qat", QAT | variant.qat | {"teacher": str(fp)}, qat),
    ):
        config = TrainConfig(
            **COMMON | settings, method=method, seed=seed, device=device, threads=threads
        )
        summary = train(config, out, log=lambda line: None)
        row[method] = {key: summary[key] for key in MEASURED}
    return row


def text(rows: list[Row]) -> str:
    """A row for the terminal."""
    row = rows[0]
    return (
        f"{row['variant']}, seed {row['seed']}: full precision {row['fp']['test_accuracy']:.2%}, "
        f"QAT {row['qat']['test_accuracy']:.2%}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench accuracy``."""
    parser.add_argument("--runs", default="runs/accuracy", help="folder of the trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variant", action="append", help="names that contain this, or =NAME (repeatable)"
    )
    add_common_arguments(parser, seconds=None)


def main(args: argparse.Namespace) -> None:
    """Train what was asked for."""
    device = set_up(args)
    cases = [(v, seed) for v in VARIANTS if matches(v, args.variant) for seed in args.seeds]
    result = measured(
        args,
        device,
        ("variant", "seed"),
        {case: case for case in cases},
        lambda case: [trained(*case, device, args.threads, Path(args.runs))],
        text,
    )
    from bench import tables  # which reads this module

    print(tables.accuracy(result))
