"""``python -m bench.triton_host``: what a call of each Triton op costs on the host.

Beside each op stands the bare launch of the same kernels with arguments that are ready: the rest
is checks and the allocation of outputs. With a CUDA device it is measured there, else for a GPU
that is not there (``absent_gpu.py``), where all is real but for the driver's own call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.absent_gpu import absent_gpu
from bench.cases import resnet50_weights
from bench.timing import environment, interleaved
from divqat.files import write_json
from divqat.ops import _triton
from divqat.ops._library import SCHEMAS

ELEMENTS = 64 * 64 * 28 * 28


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """op and what on → call of its launcher."""
    # looked up here: finding a launcher is no part of a call
    op = {name: _triton.launcher(name) for name in SCHEMAS}
    with device:
        x, weights = torch.empty(ELEMENTS), [w.to(device) for w in resnet50_weights()]
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
def _noted(launches: list[Callable[[], object]]) -> Any:
    """Notes the launches inside the block, to be made again."""
    names = {_triton.module_of(name) for name in SCHEMAS}
    modules = [importlib.import_module(f"divqat.kernels.{name}") for name in names]
    real = modules[0].launch

    def note(kernel: Any, grid: Any, device: torch.device, *args: Any, **meta: Any) -> None:
        launches.append(lambda: kernel[grid](*args, enable_fp_fusion=False, **meta))
        real(kernel, grid, device, *args, **meta)

    for module in modules:
        module.launch = note
    try:
        yield
    finally:
        for module in modules:
            module.launch = real


def measure(seconds: float) -> list[dict[str, Any]]:
    """A row for each op: medians in milliseconds, of the op and of its bare launches."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    rows = []
    with contextlib.nullcontext() if cuda else absent_gpu(90):
        for name, call in calls(device).items():
            launches: list[Callable[[], object]] = []
            with _noted(launches):
                call()

            def bare(launches: list[Callable[[], object]] = launches) -> None:
                for launch in launches:
                    launch()

            times = interleaved({"op": call, "bare": bare}, seconds)
            rows.append({"name": name, "launches": len(launches), **times})
    return rows


def table(result: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| op | launches | op µs | bare launches µs |", "|---|---:|---:|---:|"]
    for row in result["rows"]:
        op, bare = (f"{1000 * row[kind]['median']:.1f}" for kind in ("op", "bare"))
        lines.append(f"| {row['name']} | {row['launches']} | {op} | {bare} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = environment("python -m bench.triton_host " + " ".join(sys.argv[1:]))
    result["device"] = (
        torch.cuda.get_device_name() if cuda else "none: the driver's call is left out"
    )
    result["rows"] = measure(args.seconds)
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
