"""``python -m bench accuracy``: the cost of speed in accuracy, on Fashion-MNIST.

Full precision, then plain QAT from its weights. Accuracies are those on the test set after the last
epoch; learning rates were chosen on the validation split of seed 0. A stopped run is resumed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import tables
from bench.command import Row, add_common_arguments, matches, measured, set_up
from bench.variants import COMMON, FP, QAT, VARIANTS
from divqat.train import TrainConfig, train

MEASURED = ("test_accuracy", "validation_accuracy", "seconds", "waiting", "peak_memory")


def train_variant(name: str, seed: int, device: str, threads: int | None, folder: Path) -> Row:
    """Run both trainings of a variant; variants with the same settings share full precision."""
    variant = VARIANTS[name]
    first = next(other for other, v in VARIANTS.items() if v.fp == variant.fp)
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
    """Train the selected variants."""
    device = set_up(args)
    cases = [(v, seed) for v in VARIANTS if matches(v, args.variant) for seed in args.seeds]
    result = measured(
        args,
        device,
        ("variant", "seed"),
        {case: case for case in cases},
        lambda case: [train_variant(*case, device, args.threads, Path(args.runs))],
        text,
    )
    print(tables.accuracy(result))
