"""``python -m bench networks``: the networks of torchvision and timm in ONNX Runtime.

Each network has random weights, BatchNorm statistics of pictures, and a last layer that is fitted
to their classes. It is prepared, calibrated and exported, and its answers are compared with those
of a default session, beside the kernels and the time. Each network is a file in ``--runs``, and a
stopped run goes on after the last one. A network that fails is a row with the reason.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench import architectures
from bench.command import Row, rounded
from bench.deployed import AGREEMENT
from bench.environment import environment
from bench.network_case import STAGES, Plan, measure
from divqat._util.files import read_json, write_json, write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "networks.json"
PAGE = ROOT / "docs" / "networks.md"
SQNR_DB = 20.0  # of the logits, at least
LACKS = "no integer kernel"  # the one good reason for a layer in float
PASSED = "passed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench networks``."""
    plan = Plan()
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks; default: all")
    parser.add_argument("--again", action="store_true", help="also those that are measured")
    parser.add_argument("--runs", default="runs/networks", help="folder of the rows")
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--least", type=int, default=plan.least, help="pictures, at least")
    parser.add_argument(
        "--seconds", type=float, default=plan.seconds, help="of the fit, if that is more pictures"
    )
    parser.add_argument("--until", choices=STAGES, default=plan.until, help="the last stage")
    parser.add_argument("--minutes", type=float, help="start no network after this many minutes")
    parser.add_argument(
        "--write", action="store_true", help="write bench/results/networks.json and its page"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if a network misses a bar; see docs/networks.md"
    )


def main(args: argparse.Namespace) -> None:
    """Measure the networks, print the table, write and check it.

    Raises:
        SystemExit: a library is missing, a name is unknown, or with ``--check`` a bar is missed.
    """
    if absent := architectures.missing():
        raise SystemExit(
            f"bench networks: {'; '.join(absent)}: `{architectures.INSTALL}` installs them"
        )
    names = args.only or list(architectures.NETWORKS)
    if unknown := set(names) - set(architectures.NETWORKS):
        raise SystemExit(
            f"bench networks: --only: wanted {', '.join(architectures.NETWORKS)}, got {unknown}"
        )
    torch.set_num_threads(1)
    plan = Plan(args.seed, args.least, args.seconds, args.until)
    folder = Path(args.runs)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name in names:
        file = folder / f"{name}.json"
        if file.is_file() and not args.again:
            continue
        if args.minutes and time.perf_counter() - start > 60 * args.minutes:
            print(f"bench networks: not measured: {name}", file=sys.stderr)
            continue
        ended = {"stage": "measure", "message": "the process ended"}  # if it does
        write_json(file, {"network": name, "error": ended})
        write_json(file, rounded(measure(name, plan, folder) | {"environment": _environment()}))
    rows = _rows(folder)
    print(table(rows))
    if args.write:
        write_json(RESULT, {"rows": rows})
        write_text(PAGE, page(rows))
    if args.check and (missed := missed_bars(rows, names)):
        raise SystemExit("bench networks: bars that are missed:\n" + "\n".join(missed))


def _environment() -> dict[str, Any]:
    result = environment(shlex.join(["python", "-m", "bench", *sys.argv[1:]]))
    kept = ("command", "commit", "date", "hardware", "system", "threads", "versions")
    versions = architectures.versions()
    peers = ("torchao", "brevitas", "liger-kernel", "triton")
    ours = {name: v for name, v in result["versions"].items() if name not in peers}
    return {key: result[key] for key in kept} | {"versions": ours | versions}


def _rows(folder: Path) -> list[Row]:
    """The rows that are there, in the order of the architectures."""
    files = [folder / f"{name}.json" for name in architectures.NETWORKS]
    return [dict(read_json(file)) for file in files if file.is_file()]


def missed_bars(rows: list[Row], names: list[str]) -> list[str]:
    """A line for each bar that a network of these names misses."""
    found = {row["network"]: row for row in rows}
    missed = [f"{name}: not measured" for name in names if name not in found]
    for name, row in found.items():
        if name not in names:
            continue
        if "error" in row:
            missed.append(f"{name}: {row['error']['stage']}: {row['error']['message']}")
        for layer in row.get("float", []):
            if not layer["reason"].startswith(LACKS):
                missed.append(f"{name}: {layer['layer']}: {layer['kernel']}: {layer['reason']}")
        agreement = row.get("agreement")
        if "agreement" in row and (agreement is None or agreement < AGREEMENT):
            missed.append(f"{name}: agreement: {agreement}, wanted {AGREEMENT}")
        if "sqnr_db" in row and row["sqnr_db"] < SQNR_DB:
            missed.append(f"{name}: SQNR: {row['sqnr_db']} dB, wanted {SQNR_DB}")
        for check, outcome in row.get("checks", {}).items():
            if outcome != PASSED:
                missed.append(f"{name}: {check}: {outcome}")
    return missed


def table(rows: list[Row]) -> str:
    """A row per network."""
    header = [
        "network", "layers", "int8", "in float", "products of activations, int8", "agreement",
        "SQNR, dB", "ms, int8", "ms, float", "prepare, s", "checks",
    ]  # fmt: skip
    lines = [header, ["---", *["---:"] * 2, "---", *["---:"] * 6, "---"]]
    lines += [_line(row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    reasons = Counter(layer["reason"] for layer in row.get("float", []))
    floats = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if "error" in row:
        floats = f"{floats} **{row['error']['stage']}: {row['error']['message']}**".strip()
    failed = [name for name, outcome in row.get("checks", {}).items() if outcome != PASSED]
    checked = f"not {', '.join(failed)}" if failed else "all" if "checks" in row else ""
    products = f"{row['products_int8']} of {row['products']}" if row.get("products") else ""
    times, agreement = row.get("milliseconds", {}), row.get("agreement")
    return [
        row["network"],
        str(row.get("layers", "")),
        str(row.get("int8", "")),
        floats.replace("|", "\\|"),
        products,
        number(None if agreement is None else 100 * agreement, ".2f"),
        number(row.get("sqnr_db"), ".1f"),
        number(times.get("int8"), ".1f"),
        number(times.get("float"), ".1f"),
        number(row.get("prepare_seconds"), ".1f"),
        checked,
    ]


def _span(counts: list[int]) -> str:
    """The counts above 0 in words."""
    known = sorted({count for count in counts if count} or {0})
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def page(rows: list[Row]) -> str:
    """docs/networks.md."""
    measured = [row for row in rows if "environment" in row]
    environments = [row["environment"] for row in measured]
    commands = dict.fromkeys(entry["command"] for entry in environments)
    last = environments[-1]
    packages = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commits = ", ".join(dict.fromkeys(entry["commit"] for entry in environments))
    seeds = ", ".join(dict.fromkeys(str(row["seed"]) for row in measured))
    spans = {
        key: _span([row["pictures"][key] for row in measured if row.get("pictures")])
        for key in ("fit", "test")
    }
    details = "\n".join(
        f"- **{row['network']}**, {layer['layer']}: {layer['kernel']}, {layer['reason']}"
        for row in rows
        for layer in row.get("float", [])
        if layer["reason"].startswith(LACKS)
    )
    return f"""# Networks of torchvision and timm

Written by `python -m bench networks --write`, from
`{"`, `".join(commands)}`
({last["hardware"]}; {packages}; commit {commits}; seed {seeds}; {last["date"]}).

Weights are random. BatchNorm's biases are between 0.5 and 1.5 and depthwise kernels near the
identity, so that rounding errors do not grow from layer to layer, which they do not in trained
networks either. BatchNorm statistics are those of pictures, and the last layer is fitted to
their {architectures.CLASSES} classes by ridge regression, in the float network, on
{spans["fit"]} pictures; the comparison has {spans["test"]} others. *Layers* are convolutions and
products with a weight, once per call, and *int8* those that a default session of ONNX Runtime
computes with integer kernels. *Agreement* is the share, in %, of
pictures with the same class in ONNX Runtime as in the prepared network, among those whose two
largest logits are more than two steps apart (a step is the range of the logits over 255); SQNR is
that of the logits. Times are medians of one picture on one thread, in turns with the float
network's; other work may have been running. *Checks*: the float checkpoint loads; copies, pickles
and a network prepared in the other mode give the same bits; it trains, also compiled as one graph.
Of {", ".join(architectures.TRAINED)} also: Inductor, two processes (DDP) and activations saved as
codes give the same gradients, and it trains in bfloat16.

`make test-networks` fails if a layer is in float for any reason but the lack of an integer kernel,
if the agreement is below {100 * AGREEMENT} %, if the SQNR is below {SQNR_DB:.0f} dB, or if a check
fails.

An empty cell is not measured.

{table(rows)}

## Layers without an integer kernel

{details or "None."}
"""
