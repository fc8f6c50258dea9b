"""``python -m bench ptq``: post-training quantization, step by step, beside training, on digits.

Full precision, then each recipe of ``divqat.ptq`` with 512 training images, and plain QAT from the
same weights. The accuracy is that of the prepared model in eval mode, on the test images. A stopped
run is resumed.
"""

from __future__ import annotations

import argparse
import time
from functools import cache
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from bench.command import Row, add_common_arguments, matches, measured, set_up
from bench.weight_bits import learn
from divqat import models, prepare, preset, ptq
from divqat.data import Splits, load, to_float
from divqat.metrics import accuracy, predict

IMAGES, FP_STEPS, QAT_STEPS, ROUNDING_STEPS = 512, 300, 200, 500
BITS = (8, 7, 6, 5, 4, 3)
MSE: dict[str, Any] = {"activation_ranges": "mse", "weight_ranges": "mse"}
LEARNED = {**MSE, "rounding": "learned", "rounding_steps": ROUNDING_STEPS}
# method → arguments of divqat.ptq; None: training
METHODS: dict[str, dict[str, Any] | None] = {
    "minmax": {},
    "percentile": {"activation_ranges": "percentile"},
    "entropy": {"activation_ranges": "entropy"},
    "mse": MSE,
    "minmax, equalized": {"equalize": True},
    "minmax, bias correction": {"bias_correction": True},
    "mse, bias correction": {**MSE, "bias_correction": True},
    "mse, learned rounding": LEARNED,
    "mse, learned rounding, bias correction": {**LEARNED, "bias_correction": True},
    "QAT": None,
}


@cache
def data() -> Splits:
    """Digits."""
    return load("digits")


@cache
def network(seed: int) -> nn.Module:
    """LeNet in full precision."""
    torch.manual_seed(seed)
    net = models.build("lenet", in_channels=1, num_classes=10, image_size=8)
    return learn(net, data(), FP_STEPS, 0.1, seed, rises=True)


def measure(scheme: str, bits: int, seed: int, method: str) -> list[Row]:
    """The accuracy of a method, and its seconds."""
    splits, start = data(), time.perf_counter()
    rows = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))
    images = to_float(splits.train.images[rows[:IMAGES]])
    net, options = network(seed), METHODS[method]
    model = prepare(net, preset(scheme, weight_bits=bits, first_last_bits=bits), images[:2])
    if options is None:
        learn(model, splits, QAT_STEPS, 0.01, seed, rises=False)
    else:
        ptq(model, images.split(128), seed=seed, **options)
    test = splits.test
    row = {"preset": scheme, "weight_bits": bits, "seed": seed, "method": method}
    row["accuracy"] = accuracy(predict(model.eval(), test), test.labels)
    row["accuracy_float"] = accuracy(predict(net, test), test.labels)
    return [{**row, "seconds": time.perf_counter() - start}]


def text(rows: list[Row]) -> str:
    """A row for the terminal."""
    row = rows[0]
    return (
        f"{row['preset']}, {row['weight_bits']} bits, seed {row['seed']}, {row['method']}: "
        f"{row['accuracy']:.2%} (full precision {row['accuracy_float']:.2%})"
    )


def table(result: dict[str, Any]) -> str:
    """A table for each preset: a line per method, a column per width; points below full precision,
    mean ± standard deviation over the seeds."""
    parts = []
    for scheme in dict.fromkeys(row["preset"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["preset"] == scheme]
        widths = sorted({row["weight_bits"] for row in rows}, reverse=True)
        lines = [[f"method, preset `{scheme}`", *(f"{bits} bits" for bits in widths)]]
        lines.append(["---", *["---:"] * len(widths)])
        for method in METHODS:
            cells = [
                _points([row for row in rows if (row["method"], row["weight_bits"]) == (method, b)])
                for b in widths
            ]
            lines.append([method, *cells])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _points(rows: list[Row]) -> str:
    lost = [100 * (row["accuracy_float"] - row["accuracy"]) for row in rows]
    if not lost:
        return ""
    return f"{mean(lost):.1f}" + (f" ± {stdev(lost):.1f}" if len(lost) > 1 else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench ptq``."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--presets", nargs="+", default=["x86", "qnnpack"])
    parser.add_argument(
        "--method", action="append", help="names that contain this, or =NAME (repeatable)"
    )
    add_common_arguments(parser, seconds=None)


def main(args: argparse.Namespace) -> None:
    """Measure the selected presets, widths and methods."""
    device = set_up(args)
    cases = [
        (scheme, bits, seed, method)
        for scheme in args.presets
        for seed in args.seeds
        for bits in args.bits
        for method in METHODS
        if matches(method, args.method)
    ]
    result = measured(
        args,
        device,
        ("preset", "weight_bits", "seed", "method"),
        {case: case for case in cases},
        lambda case: measure(*case),
        text,
    )
    print(table(result))
