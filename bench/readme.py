"""``python -m bench readme``: the tables of docs/performance.md from the committed results.

Each block between ``<!-- bench NAME -->`` and ``<!-- /bench -->`` is generated from
``bench/results/FILE.json``; ``bench/results/README.md`` gets all rows. No number is typed by hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import tables, weight_bits
from divqat._util.files import read_json, write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
# block → (file, table)
BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "cpu-ops": ("cpu-ops.json", tables.ops),
    "cpu-steps": ("cpu-steps.json", tables.steps),
    "cpu-misdirection": ("cpu-misdirection.json", tables.steps),
    "cpu-options": ("cpu-options.json", tables.steps),
    "cuda-options": ("cuda-options.json", tables.steps),
    "cpu-scaling": ("cpu-scaling.json", tables.scaling),
    "cuda-ops": ("cuda-ops.json", tables.ops),
    "cuda-steps": ("cuda-steps.json", tables.steps),
    "cuda-scaling": ("cuda-scaling.json", tables.scaling),
    "cpu-accuracy": ("cpu-accuracy.json", tables.accuracy),
    "cpu-accuracy-1024": ("cpu-accuracy-1024.json", tables.accuracy),
    "cpu-weight-bits": ("cpu-weight-bits.json", weight_bits.table),
    "cuda-accuracy": ("cuda-accuracy.json", tables.accuracy),
    "triton-host": ("triton-host.json", tables.host),
}
DETAILS = {"cpu-ops": "CPU", "cuda-ops": "GPU"}


def block(name: str, results: Path = RESULTS) -> str:
    """The text between the marks."""
    file, table = BLOCKS[name]
    if not (results / file).is_file():
        return "Not measured."
    result = read_json(results / file)
    return f"{tables.head(result)}:\n\n{table(result)}"


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with its blocks filled.

    Raises:
        KeyError: it has an unknown block.
    """
    mark = re.compile(r"(<!-- bench (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
    return mark.sub(lambda m: f"{m[1]}{block(m[2], results)}\n{m[3]}", text)


def details(results: Path = RESULTS) -> str:
    """The page of all rows: median times, and costs that do not depend on the machine."""
    parts = [
        "# All rows\n\nWritten by `python -m bench readme`. `--on` picks one shape: "
        "`python -m bench run --op fake_quantize --on 'ResNet-50 [8, 64' --dtype bfloat16`."
    ]
    for name, title in DETAILS.items():
        file = results / BLOCKS[name][0]
        if not file.is_file():
            parts.append(f"## {title}\n\nNot measured.")
            continue
        result = read_json(file)
        parts += [
            f"## {title}\n\n{tables.head(result)}",
            tables.cases(result),
            "### Dispatches and memory\n\nOf one forward and backward; memory in multiples of the "
            "input. *Kept* is what went through `save_for_backward`; the gradient that our "
            "`divergence_loss` computes in its forward does not, and is in *extra memory* only.\n\n"
            + tables.costs(result),
        ]
    return "\n\n".join(parts) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench readme``."""
    parser.add_argument("--check", action="store_true", help="only check that they are up to date")


def main(args: argparse.Namespace) -> None:
    """Fill the tables.

    Raises:
        SystemExit: with ``--check``, a file is out of date.
    """
    pages = {
        PAGE: filled(PAGE.read_text(encoding="utf-8")),
        RESULTS / "README.md": details(),
    }
    for file, text in pages.items():
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            raise SystemExit(f"bench readme: {file.relative_to(ROOT)} is out of date")
        write_text(file, text)
        print(f"wrote {file.relative_to(ROOT)}")
