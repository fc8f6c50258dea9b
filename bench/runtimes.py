"""``python -m bench runtimes``: the built-in networks in every runtime that they are exported to.

Each network is trained for a short time on scikit-learn's digits with each preset, so that its
answers have margins, and exported to each runtime. The answers are compared with those of the
trained network; size and time are those of the float network in the same runtime. What a runtime
cannot do is a row with the reason.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import divqat
from bench.command import Row, first_line, rounded
from bench.deployed import AGREEMENT, MARGIN, decided, logit_step
from bench.environment import environment
from bench.runtime_targets import TARGETS, Target
from divqat import models
from divqat._util.files import write_json, write_text
from divqat._util.progress import progress
from divqat.data import load, to_float
from divqat.victim.runners import logits_function, open_file

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "runtimes.json"
PAGE = ROOT / "docs" / "runtimes.md"
PRESETS = ("x86", "qnnpack", "tensorrt")
SIZE, STEPS, BATCH = 16, 120, 64  # of the training
ROUNDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench runtimes``."""
    parser.add_argument("--networks", nargs="+", choices=models.names(), default=models.names())
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--runtimes", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", action="store_true", help="write bench/results/runtimes.json and its page"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if a runtime is missing, or a bar is missed"
    )


def main(args: argparse.Namespace) -> None:
    """Measure, print the tables, write and check them.

    Raises:
        SystemExit: with ``--check`` a bar is missed.
    """
    torch.set_num_threads(1)
    cases = [(name, preset) for name in args.networks for preset in args.presets]
    rows = []
    for name, preset in progress(cases, "bench runtimes", total=len(cases), unit="network"):
        rows += measure(name, preset, args.runtimes, args.steps, args.seed)
    result = {**_environment(args.runtimes), "seed": args.seed, "rows": rounded(rows)}
    print(tables(rows))
    if args.write:
        write_json(RESULT, result)
        write_text(PAGE, page(result))
    if args.check and (missed := missed_bars(rows)):
        raise SystemExit("bench runtimes: bars that are missed:\n" + "\n".join(missed))


def _environment(runtimes: list[str]) -> dict[str, Any]:
    result = environment(shlex.join(["python", "-m", "bench", *sys.argv[1:]]))
    kept = ("command", "commit", "date", "hardware", "system")
    versions = {name: result["versions"][name] for name in ("python", "divqat", "torch", "onnx")}
    for name in runtimes:
        try:
            versions[name] = metadata.version(TARGETS[name].package)
        except metadata.PackageNotFoundError:
            continue
    return {key: result[key] for key in kept} | {"versions": versions}


def measure(name: str, preset: str, runtimes: list[str], steps: int, seed: int) -> list[Row]:
    """A row for each runtime."""
    digits = load("digits")
    images = F.interpolate(to_float(digits.train.images), SIZE)
    test = F.interpolate(to_float(digits.test.images), SIZE)
    torch.manual_seed(seed)
    net = models.build(name, in_channels=1, num_classes=10, image_size=SIZE)
    prepared = _train(divqat.prepare(net, preset, images[:2]), images, digits.train.labels, steps)
    wanted = logits_function(prepared)(test)
    rows = []
    for runtime in runtimes:
        row: Row = {"network": name, "preset": preset, "runtime": runtime}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the row has what matters
            try:
                row |= _in_runtime(TARGETS[runtime], prepared, net.eval(), images, Path(folder))
                got = row.pop("run")(test)
                row |= compared(wanted, got, digits.test.labels)
            except Exception as error:  # whatever a runtime raises is its result
                row["error"] = first_line(error)[:300]
        rows.append(row)
    return rows


def _train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        part = torch.randperm(len(images))[:BATCH]
        loss = F.cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _in_runtime(
    target: Target, prepared: nn.Module, net: nn.Module, images: Tensor, folder: Path
) -> Row:
    """Size and time of the file, beside the float network's; ``run`` is the file as a function."""
    path, float_path = (folder / f"{name}{target.suffix}" for name in ("int8", "float"))
    report = target.export(prepared, images, path)
    target.export_float(net, images, float_path)
    runs = {name: _open(p) for name, p in (("int8", path), ("float", float_path))}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images[:1])
            if turn >= 2:  # after a warm-up
                times[name].append(1000 * (time.perf_counter() - start))
    return {
        "bytes": {"int8": _size(path), "float": _size(float_path)},
        "milliseconds": {name: median(values) for name, values in times.items()},
        "saturating": len(getattr(report, "saturating", ())),
        "run": runs["int8"],
    }


def _open(path: Path) -> Callable[[Tensor], Tensor]:
    return logits_function(open_file(path, precise=False))


def _size(path: Path) -> int:
    """Bytes of a file, with its weights if they are beside it."""
    return sum(p.stat().st_size for p in (path, path.with_suffix(".bin")) if p.is_file())


def compared(
    wanted: Tensor,  # [N, num_classes], of the trained network
    got: Tensor,  # [N, num_classes], of the file
    labels: Tensor,  # [N]
) -> Row:
    """Agreement, difference and accuracy."""
    clear = decided(wanted)
    same = (wanted.argmax(-1) == got.argmax(-1)).double()
    difference = (wanted - got).abs() / logit_step(wanted)
    return {
        "images": len(labels),
        "agreement": float(same.mean()),
        "agreement_decided": float(same[clear].mean()) if clear.any() else None,
        "steps_most": float(difference.max()),
        "steps_mean": float(difference.mean()),
        "accuracy_trained": float((wanted.argmax(-1) == labels).double().mean()),
        "accuracy": float((got.argmax(-1) == labels).double().mean()),
    }


def missed_bars(rows: list[Row]) -> list[str]:
    """A line for each row that fails, or whose decided images get other classes although no layer
    can saturate."""
    missed = []
    for row in rows:
        label = f"{row['network']}, {row['preset']}, {row['runtime']}"
        if "error" in row:
            missed.append(f"{label}: {row['error']}")
        elif not row["saturating"] and (row["agreement_decided"] or 0.0) < AGREEMENT:
            missed.append(f"{label}: agreement {row['agreement_decided']}, wanted {AGREEMENT}")
    return missed


def tables(rows: list[Row]) -> str:
    """A row per network and preset, a column per runtime: answers; then size and time."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    cases = list(dict.fromkeys((row["network"], row["preset"]) for row in rows))
    found = {(row["network"], row["preset"], row["runtime"]): row for row in rows}

    def table(cell: Callable[[Row], str]) -> str:
        lines = [["network", "preset", *runtimes], ["---", "---", *["---"] * len(runtimes)]]
        for case in cases:
            lines.append([*case, *(cell(found[(*case, runtime)]) for runtime in runtimes)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    return f"{table(_answers)}\n\n{table(_costs)}"


def _answers(row: Row) -> str:
    if "error" in row:
        return row["error"].replace("|", "\\|")
    saturates = f"; {row['saturating']} layers can saturate" if row["saturating"] else ""
    return (
        f"{100 * row['agreement']:.1f} %, {row['steps_most']:.1f} steps, accuracy "
        f"{100 * row['accuracy']:.1f} ({100 * row['accuracy_trained']:.1f}){saturates}"
    )


def _costs(row: Row) -> str:
    if "error" in row:
        return ""
    size, times = row["bytes"], row["milliseconds"]
    return (
        f"{size['int8'] / 1024:.0f} of {size['float'] / 1024:.0f} KiB, "
        f"{times['int8']:.2f} of {times['float']:.2f} ms"
    )


def page(result: dict[str, Any]) -> str:
    """docs/runtimes.md."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    answers, costs = tables(result["rows"]).split("\n\n")
    images = next((row["images"] for row in result["rows"] if "images" in row), 0)
    return f"""# Runtimes

Written by `{result["command"]}` ({result["hardware"]}; {versions}; commit {result["commit"]}; seed
{result["seed"]}; {result["date"]}).

The built-in networks, trained for a short time on {SIZE} × {SIZE} pictures of digits with each
preset, and exported to each runtime. `make test-runtimes` installs the runtimes, measures this, and
fails if a file cannot be made or run, or if less than {100 * AGREEMENT} % of the decided images get
the same class as in the trained network, unless the export named layers that can saturate on CPUs
without VNNI. *Decided* images have two largest logits more than {MARGIN} steps apart.

TensorRT cannot run here: `tensorrt` is the preset of its files, run in other runtimes. LiteRT,
TensorFlow Lite Micro, TVM and IREE: not measured.

## Answers

On {images} test images: share with the same class as in the trained network; the largest difference
of a logit, in steps (the range of the logits over 255); accuracy in the runtime (in the trained
network). ExecuTorch's programs cut logits to their range on the training images.

{answers}

## Size and time

Of the file, beside that of the float network in the same runtime; milliseconds per image, one at a
time, with default options (medians, in turns; other work may have been running).

{costs}
"""
