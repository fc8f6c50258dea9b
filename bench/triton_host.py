"""``python -m bench host``: host time of a call of each Triton op.

For comparison, the bare launches of the same kernels are timed with prepared arguments: the
difference is checks and the allocation of outputs. Without a CUDA device, the measurement uses a
simulated GPU (``absent_gpu.py``), where everything is real except for the driver's own call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from bench.command import add_common_arguments, measured, set_up
from bench.measure import Runner, interleaved
from bench.nets import weights as weights_of
from divqat.ops import _triton
from divqat.ops._library import SCHEMAS

ELEMENTS = 64 * 64 * 28 * 28
BARE = "bare launches"


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """Op and its input → call of its launcher."""
    # looked up in advance, as this is not part of a call
    op = {name: _triton.launcher(name) for name in SCHEMAS}
    with device:
        x, weights = torch.empty(ELEMENTS), [w.to(device) for w in weights_of("ResNet-50")]
        q = (torch.ones(()), torch.zeros((), dtype=torch.int32))
        state, offset = (torch.zeros(()), torch.ones(()), *q), torch.zeros(())
        mask = torch.empty(ELEMENTS // 8, dtype=torch.uint8)
        logits, target = torch.empty(1024, 1000), torch.zeros(1024, dtype=torch.int64)
        weight = torch.full((), 0.1)
    options, lsq = (0, 255, None, 0.1, False), (q[0], offset, -128, 127, None)
    loss = (target, weight, 4.0, "student_teacher", "all", None, False, 0.0, -100)
    return {
        "fake_quantize": lambda: op["fake_quantize"](x, *q, -128, 127, None, True),
        "fake_quantize_backward": lambda: op["fake_quantize_backward"](x, mask),
        "observe": lambda: op["observe"](x, *state, *options, True),
        "fake_quantize_observed exact": lambda: op["fake_quantize_observed"](
            x, *state, *options, "exact", True
        ),
        "fake_quantize_observed delayed": lambda: op["fake_quantize_observed"](
            x, *state, *options, "delayed", True
        ),
        "fake_quantize_observed_inplace": lambda: op["fake_quantize_observed_inplace"](
            x, *state, *options, "exact", True
        ),
        "fake_quantize_lsq": lambda: op["fake_quantize_lsq"](x, *lsq),
        "fake_quantize_lsq_backward": lambda: op["fake_quantize_lsq_backward"](x, x, *lsq, 0.1),
        "fake_quantize_weights, ResNet-50": lambda: op["fake_quantize_weights"](
            weights, -127, 127, 0
        ),
        "fake_quantize_weights_backward, ResNet-50": lambda: op["fake_quantize_weights_backward"](
            weights, weights, -128, 127, 0
        ),
        "divergence_loss, [1024, 1000]": lambda: op["divergence_loss"](logits, logits, *loss),
        "divergence_loss_backward": lambda: op["divergence_loss_backward"](logits, weight),
    }


@contextlib.contextmanager
def _recorded(launches: list[Callable[[], object]]) -> Any:
    """A block that records its launches, so that they can be repeated."""
    names = {_triton.module_of(name) for name in SCHEMAS}
    modules = [importlib.import_module(f"divqat.kernels.{name}") for name in names]
    real = modules[0].launch

    def record(kernel: Any, grid: Any, device: torch.device, *args: Any, **meta: Any) -> None:
        launches.append(lambda: kernel[grid](*args, enable_fp_fusion=False, **meta))
        real(kernel, grid, device, *args, **meta)

    for module in modules:
        module.launch = record
    try:
        yield
    finally:
        for module in modules:
            module.launch = real


def measure(name: str, call: Callable[[], object], seconds: float) -> list[dict[str, Any]]:
    """Two rows: the op, and its bare launches."""
    launches: list[Callable[[], object]] = []
    with _recorded(launches):
        call()

    def bare(_: int) -> None:
        for launch in launches:
            launch()

    times = interleaved({"op": Runner(lambda i: call()), BARE: Runner(bare)}, "cpu", seconds)
    return [
        {"op": name, "launches": len(launches), "contender": kind, "milliseconds": times[kind]}
        for kind in times
    ]


def summary(rows: list[dict[str, Any]]) -> str:
    """An op for the terminal."""
    parts = [f"{row['contender']} {1e3 * row['milliseconds']['median']:.1f} µs" for row in rows]
    return f"{rows[0]['op']}: {rows[0]['launches']} launches, {', '.join(parts)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench host``."""
    add_common_arguments(parser, seconds=1.0)


def main(args: argparse.Namespace) -> None:
    """Measure every op.

    Raises:
        SystemExit: triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("bench host: nothing to measure: triton is not installed")
    from bench.absent_gpu import absent_gpu

    device = set_up(args)
    with contextlib.nullcontext() if device == "cuda" else absent_gpu(90):
        cases = calls(torch.device(device))
        measured(
            args,
            device,
            ("op",),
            {(name,): (name, call) for name, call in cases.items()},
            lambda case: measure(*case, args.seconds),
            summary,
        )
