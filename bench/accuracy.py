"""``python -m bench accuracy``: what speed costs in accuracy, on Fashion-MNIST.

Full precision, then plain QAT from its weights, both in the same precision, at the same batch size
and with the same optimizer. Accuracies are those on the test set after the last epoch; nothing is
chosen by them. Each training resumes where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.command import Row, add_common_arguments, matches, measured, set_up
from divqat.train import TrainConfig, train

# Of a run with 128 images per step in float32: settings of both trainings, of each of the two.
COMMON = dict(dataset="fashion-mnist", batch_size=128, pad=2, flip=True)
FP = dict(epochs=6, lr=0.1, schedule="one-cycle")
QAT = dict(epochs=3, lr=0.005)
SMALL = dict(model="lenet")  # CPUs multiply float16 slowly
LARGE = dict(batch_size=1024, base_batch_size=128)
# variant → (what it is compared with, settings of both trainings, of the first, of the second)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "VGG-small": ("VGG-small", {}, {}, {}),
    "VGG-small, bfloat16": ("VGG-small", dict(precision="bfloat16"), {}, {}),
    "VGG-small, batch 1024, SGD, linear": (
        "VGG-small",
        dict(**LARGE, lr_scaling="linear"),
        dict(lr_warmup_epochs=2),
        dict(lr_warmup_epochs=0.5),
    ),
    "VGG-small, batch 1024, SGD, square root": (
        "VGG-small",
        dict(**LARGE, lr_scaling="sqrt"),
        dict(lr_warmup_epochs=2),
        dict(lr_warmup_epochs=0.5),
    ),
    "VGG-small, batch 1024, LARS": (
        "VGG-small",
        dict(**LARGE, optimizer="lars", lr_scaling="sqrt"),
        dict(lr_warmup_epochs=2, lr=5.0),
        dict(lr_warmup_epochs=0.5, lr=0.5),
    ),
    "VGG-small, batch 1024, LAMB": (
        "VGG-small",
        dict(**LARGE, optimizer="lamb", lr_scaling="sqrt"),
        dict(lr_warmup_epochs=2, lr=0.003),
        dict(lr_warmup_epochs=0.5, lr=0.0003),
    ),
    "LeNet": ("LeNet", SMALL, {}, {}),
    "LeNet, bfloat16": ("LeNet", dict(**SMALL, precision="bfloat16"), {}, {}),
    "LeNet, float16": ("LeNet", dict(**SMALL, precision="float16"), {}, {}),
}

MEASURED = ("test_accuracy", "validation_accuracy", "seconds", "waiting", "peak_memory")


def trained(variant: str, seed: int, device: str, threads: int | None, folder: Path) -> Row:
    """Both trainings of a variant."""
    _, common, *own = VARIANTS[variant]
    settings = dict(COMMON, model="vgg_small", seed=seed, device=device, threads=threads)
    row: Row = {"variant": variant, "seed": seed}
    teacher: Mapping[str, str] = {}
    for method, base, changes in zip(("fp", "qat"), (FP, QAT), own, strict=True):
        config = TrainConfig(
            **{**settings, **base, **common, **changes, **teacher, "method": method}
        )
        out = folder / variant.replace(", ", "-").replace(" ", "-") / f"seed{seed}" / method
        summary = train(config, out, log=lambda line: None)
        teacher = {"teacher": str(out)}
        row[method] = {
            name: summary[name]
            for name in (
                "test_accuracy",
                "validation_accuracy",
                "seconds",
                "waiting",
                "peak_memory",
            )
        }
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
    parser.add_argument("--variant", action="append", help="names that contain this (repeatable)")
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
