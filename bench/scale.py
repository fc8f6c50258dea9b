"""``python -m bench scale``: time and memory against elements, batch, classes, layers and threads.

The exponent k of size^k is fitted to the upper half of the sizes, where fixed costs no longer
matter: 1 is linear, 0 is constant; -1 for threads is a perfect speedup.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from bench import activations, losses, step, tables, weights
from bench.case import COPY, Plan
from bench.command import add_common_arguments, measured, set_up
from bench.curves import OBSERVED, SWEEPS
from bench.plots import plot_scaling
from bench.run import measure
from divqat._util.devices import cpu_threads
from divqat.ops._backend import best

PEERS = ["torch.ao fused", "PyTorch, eager"]


def sizes(sweep: str, device: str) -> list[int]:
    """The sizes of a sweep; for threads 1, 2, 4 … up to the number of cores, on the CPU only."""
    if sweep != "threads":
        return SWEEPS[sweep][1 if device == "cpu" else 2]
    cores = os.cpu_count() or 1
    powers = [2**k for k in range(cores.bit_length()) if 2**k < cores]
    return [*powers, cores] if device == "cpu" and cores > 1 else []


def point(sweep: str, size: int, device: str, seconds: float) -> list[dict[str, Any]]:
    """The rows of one size."""
    ours = f"divqat {best(device)}"
    names = [ours, *PEERS]
    if sweep == "batch":
        rows = step.measure(
            "ResNet-20", size, "float32", device, seconds, [ours, "torch.ao fused"], ["eager"]
        )
    elif sweep == "classes":
        plan = Plan(losses.OP, f"logits [256, {size}]", (256, size))
        rows = measure(losses.case(plan, device), device, seconds, names)
    elif sweep == "layers":
        plan = Plan(weights.OP, f"{size} weights", ())
        tensors = [torch.empty(64, 64, 3, 3)] * size
        rows = measure(weights.case_of(plan, tensors, device), device, seconds, names)
    else:
        elements = size if sweep == "elements" else 2**22
        plan = Plan(OBSERVED, f"{elements} elements", (elements,))
        with cpu_threads(size if sweep == "threads" else None):
            rows = measure(activations.case(plan, device), device, seconds, names)
    return [{"sweep": sweep, "size": size, **row} for row in rows]


def summary(rows: list[dict[str, Any]]) -> str:
    """The rows of one size for the terminal."""
    parts = [
        f"{row['contender']} {row['milliseconds']['median']:.3f} ms"
        for row in rows
        if "milliseconds" in row and row["contender"] != COPY
    ]
    return f"{rows[0]['sweep']} {rows[0]['size']}: {', '.join(parts)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench scale``."""
    parser.add_argument("--over", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    add_common_arguments(parser, seconds=0.5)


def main(args: argparse.Namespace) -> None:
    """Measure the selected sweeps."""
    device = set_up(args)
    keys = [(sweep, size) for sweep in args.over for size in sizes(sweep, device)]
    result = measured(
        args,
        device,
        ("sweep", "size"),
        {key: key for key in keys},
        lambda key: point(*key, device, args.seconds),
        summary,
    )
    print(tables.scaling(result))
    if args.plot:
        plot_scaling(result, args.plot)
