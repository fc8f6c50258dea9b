"""``python -m bench run``: every op beside its opponents, checked, then timed.

A contender is first compared with an independent reference; one that is wrong, or fails, gets no
time. What is absent is listed with the reason.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import activations, losses, weights
from bench.case import DTYPES, LAYOUTS, Absent, Case, Contender, Plan
from bench.environment import SAME, environment
from bench.measure import (
    Runner,
    costs,
    enqueue_microseconds,
    interleaved,
    saved_bytes,
    settle_allocator,
)
from divqat.files import read_json, write_json, write_text
from divqat.progress import progress

COPY = "copy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench run``."""
    parser.add_argument("--op", action="append", help="ops whose name contains this (repeatable)")
    parser.add_argument("--on", action="append", help="networks or shapes, likewise")
    parser.add_argument("--contender", action="append", help="contenders, likewise")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--seconds", type=float, default=0.5, help="per contender and case")
    parser.add_argument("--minutes", type=float, help="start no further case after so many")
    parser.add_argument("--json", help="write the result here; a run that was stopped goes on")
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw the rows here (.png, .svg)")
    parser.add_argument("--list", action="store_true", help="list cases and contenders only")


def main(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    start = time.perf_counter()
    device = set_up(args)
    chosen = list(plans(args, device))
    if not chosen:
        raise SystemExit("bench run: no case has such an op, dtype, layout and shape")
    if args.list:
        for plan in chosen:
            print(plan)
        return
    result = begin(args.json, args, device)
    done = {key(row) for row in result["rows"]}
    todo = [plan for plan in chosen if key(plan.__dict__) not in done]
    for plan in progress(todo, "bench run", unit="case"):
        if args.minutes and time.perf_counter() - start > 60 * args.minutes:
            print(f"bench run: not measured for want of time: {plan}", file=sys.stderr)
            continue
        rows = measure(make(plan, device), device, args.seconds, args.contender)
        result["rows"] += rows
        print(summary(rows), flush=True)
        if args.json:
            write_json(args.json, result)
    if args.csv:
        write_text(args.csv, as_csv(result["rows"]))
    if args.plot:
        from bench.plots import plot_rows

        plot_rows(result, Path(args.plot))


def set_up(args: argparse.Namespace) -> str:
    """Threads and device.

    Raises:
        SystemExit: there is no such device.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: nothing to measure: no CUDA device is available")
    return device


def begin(file: str | None, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """A new result, or the one in ``file`` if it was begun in the same way.

    Raises:
        SystemExit: the file holds another run.
    """
    options = {name: value for name, value in vars(args).items() if name in ("seconds",)}
    result = environment("python -m bench " + " ".join(sys.argv[1:]))
    result |= {"device": device, "options": options, "rows": []}
    if not file or not Path(file).is_file():
        return result
    before = read_json(file)
    differing = [k for k in (*SAME, "device", "options") if before.get(k) != result[k]]
    if differing:
        raise SystemExit(
            f"bench: {file} holds a run with other {', '.join(differing)}; name another file, "
            "or remove it"
        )
    return before


def plans(args: argparse.Namespace, device: str) -> Iterator[Plan]:
    """The cases that the options name."""
    for module in (activations, weights, losses):
        for plan in module.plans(device, args.dtype, args.layout):
            if matches(plan.op, args.op) and matches(plan.on, args.on):
                yield plan


def matches(name: str, parts: list[str] | None) -> bool:
    """Whether the name contains one of the parts; nothing asked for is everything."""
    return parts is None or any(part.lower() in name.lower() for part in parts)


def make(plan: Plan, device: str, rotations: int | None = None) -> Case:
    """Allocate a case."""
    module = {weights.OP: weights, losses.OP: losses}.get(plan.op, activations)
    return module.case(plan, device, rotations)


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What identifies a case in a list of rows."""
    return tuple(row[name] for name in ("op", "on", "dtype", "layout"))


def measure(
    case: Case, device: str, seconds: float, names: list[str] | None = None
) -> list[dict[str, Any]]:
    """One row per contender, and one for a copy of the same memory."""
    settle_allocator()
    plan = case.plan
    identity = {
        "op": plan.op,
        "on": plan.on,
        "shape": list(plan.shape),
        "dtype": plan.dtype,
        "layout": plan.layout,
    }
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, build in case.contenders.items():
        if matches(name, names):
            rows[name] = {**identity, "contender": name}
            contender = admitted(case, build, rows[name])
            if contender is not None:
                ready[name] = contender
    runners = {
        name: Runner(lambda i, c=contender: case.run(c, i), contender.serving)
        for name, contender in ready.items()
    }
    runners[COPY] = _copy(case)
    rows[COPY] = {**identity, "contender": COPY}
    times = interleaved(runners, device, seconds)
    copied = 2 * sum(t.nbytes for t in case.copied[0])
    bandwidth = copied / times[COPY]["median"]  # bytes per millisecond
    for name, runner in runners.items():
        moved = copied if name == COPY else case.bytes - ready[name].saves
        rows[name] |= {
            "milliseconds": times[name],
            "bytes": moved,
            "gb_per_s": moved / times[name]["median"] / 1e6,
            "share_of_copy": moved / times[name]["median"] / bandwidth,
            "enqueue_us": enqueue_microseconds(runner) if device == "cuda" else None,
            **costs(runner, device),
        }
        if name != COPY:
            rows[name]["saved_bytes"] = _saved(case, ready[name])
    torch._dynamo.reset()  # what was compiled for this case serves no other
    gc.collect()
    return list(rows.values())


def admitted(case: Case, build: Any, row: dict[str, Any]) -> Contender | None:
    """The contender, if it is there and right; else ``row`` says what it is."""
    inputs = case.inputs[0]
    try:
        contender = build()
    except Absent as reason:
        row["absent"] = str(reason)
        return None
    try:
        with contender.serving():
            start = time.perf_counter()
            outputs, grads = case.run(contender, 0)
            row["first_call_s"] = time.perf_counter() - start
            outputs = [t.detach().clone() for t in outputs]
            grads = [t.detach().clone() for t in grads]
    except Exception as error:  # whatever a peer raises for a dtype, layout or device
        row["fails"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None
    try:
        case.check(contender, inputs, outputs, grads)
    except AssertionError as error:
        row["wrong"] = str(error) or "it disagrees with the reference"
        return None
    return contender


def _copy(case: Case) -> Runner:
    targets = [torch.empty_like(t) for t in case.copied[0]]

    def copy(i: int) -> None:
        for target, source in zip(targets, case.copied[i % len(case.copied)], strict=True):
            target.copy_(source)

    return Runner(copy)


def _saved(case: Case, contender: Contender) -> int:
    inputs = case.inputs[0]
    alive = [*contender.parameters, *(inputs.leaves if case.inputs_live_on else [])]
    with contender.serving():
        return saved_bytes(lambda: contender.forward(*inputs.args), alive)


def summary(rows: list[dict[str, Any]]) -> str:
    """A case for the terminal."""
    first = rows[0]
    lines = [f"\n{first['op']}, {first['on']}, {first['dtype']}, {first['layout']}"]
    for row in rows:
        name = f"  {row['contender']:<40}"
        status = next((s for s in ("absent", "fails", "wrong") if s in row), None)
        if status:
            lines.append(f"{name}{status}: {row[status]}")
            continue
        t = row["milliseconds"]
        lines.append(
            f"{name}{t['median']:9.3f} ms ({t['p20']:.3f} to {t['p80']:.3f}) "
            f"{row['gb_per_s']:8.1f} GB/s {100 * row['share_of_copy']:5.0f} % of a copy, "
            f"{_calls(row)}, {row['syncs']} syncs, "
            f"{row['extra_bytes'] / 2**20:.1f} MB, {row.get('saved_bytes', 0) / 2**20:.1f} MB saved"
        )
    return "\n".join(lines)


def _calls(row: dict[str, Any]) -> str:
    if row["launches"] is None:
        return f"{row['operators']} operators"
    return f"{row['launches']} launches"


def as_csv(rows: list[dict[str, Any]]) -> str:
    """One line per row; times in milliseconds, memory in bytes."""
    flat = []
    for row in rows:
        times = row.get("milliseconds", {})
        rest = {k: v for k, v in row.items() if k != "milliseconds"}
        flat.append(rest | {f"{name}_ms": value for name, value in times.items()})
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
