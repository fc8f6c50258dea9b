"""``python -m bench tune``: the Triton kernels with other tiles and numbers of warps, on 64 MB."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from bench import activations
from bench.case import COPY, DTYPES, Plan
from bench.command import add_common_arguments, measured, set_up
from bench.run import measure

CHOICES = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))
OURS = "divqat triton"


@contextlib.contextmanager
def tiles(block: int, warps: int) -> Iterator[None]:
    """A block in which every launch has this tile and this many warps."""
    from divqat.kernels import _channel_reduction, fake_quantize, fake_quantize_observed

    plan = _channel_reduction.plan

    def other(*args: Any) -> Any:
        grid, meta = plan(*args)
        return grid, meta | {"BLOCK_K": block // meta["BLOCK_C"], "num_warps": warps}

    choice = {"BLOCK": block, "num_warps": warps}
    modules: list[Any] = [fake_quantize, fake_quantize_observed]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "block_of", lambda *_: choice))
        for name in ("observe", "fake_quantize_lsq"):
            stack.enter_context(mock.patch(f"divqat.kernels.{name}.plan", other))
        yield


def case(
    op: str, dtype: str, block: int, warps: int, device: str, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one choice."""
    elements = 2**26 // DTYPES[dtype].itemsize
    plan = Plan(op, f"{elements} elements", (elements,), dtype)
    with tiles(block, warps):
        rows = measure(activations.case(plan, device), device, seconds, [OURS])
    return [{**row, "block": block, "warps": warps} for row in rows if row["contender"] != COPY]


def summary(rows: list[dict[str, Any]]) -> str:
    """A choice for the terminal."""
    lines = []
    for row in rows:
        what = f"{row['contender']:<24}{row['op']:<30}{row['dtype']:<10}"
        tile = f"{row['block']:5} x{row['warps']}"
        if "milliseconds" in row:
            time = f"{row['milliseconds']['median']:9.4f} ms"
            lines.append(f"{what}{tile}{time}  {100 * row['share_of_copy']:.0f} % of a copy")
        else:
            lines.append(f"{what}{tile}  {row.get('fails') or row.get('wrong') or row['absent']}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench tune``."""
    add_common_arguments(parser, seconds=0.2)


def main(args: argparse.Namespace) -> None:
    """Measure every choice on CUDA.

    Raises:
        SystemExit: there is no CUDA device.
    """
    args.device = "cuda"
    device = set_up(args)
    cases = [
        (op, dtype, block, warps)
        for op in activations.OPS
        for dtype in DTYPES
        for block, warps in CHOICES
    ]
    measured(
        args,
        device,
        ("op", "dtype", "block", "warps"),
        {case: case for case in cases},
        lambda key: case(*key, device, args.seconds),
        summary,
    )
