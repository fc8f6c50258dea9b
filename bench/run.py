"""``python -m bench run``: every op and its alternatives, checked, then timed.

A contender is first compared with an independent reference; one that is wrong or fails gets no
time. Absent contenders are listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench import activations, losses, weights
from bench.case import COPY, DTYPES, LAYOUTS, Absent, Case, Contender, Plan
from bench.command import add_common_arguments, first_line, matches, measured, set_up, status
from bench.measure import (
    Runner,
    costs,
    enqueue_microseconds,
    interleaved,
    saved_bytes,
    settle_allocator,
)
from bench.plots import plot_rows

OPS = (*activations.OPS, weights.OP, losses.OP)
KEY = ("op", "on", "dtype", "layout")  # identifies a case among rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench run``."""
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument(
        "--on", action="append", help="networks or shapes that contain this (repeatable)"
    )
    parser.add_argument("--contender", action="append", help="contenders that contain this")
    parser.add_argument("--without", action="append", help="no contenders that contain this")
    parser.add_argument("--by-turns", action="store_true", help="a case of each op first")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--list", action="store_true", help="only list the cases")
    add_common_arguments(parser, seconds=0.5)


def main(args: argparse.Namespace) -> None:
    """Measure the selected cases."""
    device = set_up(args)
    chosen = list(plans(args, device))
    if args.by_turns:
        chosen = by_turns(chosen)
    if not chosen:
        raise SystemExit("bench run: no case has this op, shape, dtype and layout")
    if args.list:
        print(*chosen, sep="\n")
        return
    result = measured(
        args,
        device,
        KEY,
        {plan.key: plan for plan in chosen},
        lambda plan: measure(
            without(make(plan, device), args.without), device, args.seconds, args.contender
        ),
        summary,
    )
    if args.plot:
        plot_rows(result, args.plot)


def plans(args: argparse.Namespace, device: str) -> Iterator[Plan]:
    """The cases that the options select."""
    for module in (activations, weights, losses):
        for plan in module.plans(device, args.dtype, args.layout):
            if plan.op in args.op and matches(plan.on, args.on):
                yield plan


def by_turns(plans: list[Plan]) -> list[Plan]:
    """The first case of each op, then the second of each."""
    ops = Counter[str]()
    turns = []
    for plan in plans:
        turns.append((ops[plan.op], plan))
        ops[plan.op] += 1
    return [plan for _, plan in sorted(turns, key=lambda turn: turn[0])]


def without(case: Case, names: list[str] | None) -> Case:
    """The case less the contenders whose names contain one of these."""
    if names is not None:
        kept = {k: v for k, v in case.contenders.items() if not matches(k, names)}
        case = replace(case, contenders=kept)
    return case


def make(plan: Plan, device: str, rotations: int | None = None) -> Case:
    """Allocate a case."""
    module = {weights.OP: weights, losses.OP: losses}.get(plan.op, activations)
    return module.case(plan, device, rotations)


def measure(
    case: Case, device: str, seconds: float, names: list[str] | None = None
) -> list[dict[str, Any]]:
    """One row per contender, and one for a copy of the input."""
    settle_allocator()
    identity = dict(zip(KEY, case.plan.key, strict=True))
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, build in case.contenders.items():
        if matches(name, names):
            rows[name] = {**identity, "contender": name}
            contender = admit(case, build, rows[name])
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
            **costs(runner, device),
        }
        if device == "cuda":
            rows[name]["enqueue_us"] = enqueue_microseconds(runner)
        if name != COPY:
            rows[name]["saved_bytes"] = _saved(case, ready[name])
    torch._dynamo.reset()  # graphs compiled for this case are not needed any more
    gc.collect()
    return list(rows.values())


def admit(case: Case, build: Any, row: dict[str, Any]) -> Contender | None:
    """The contender if it is available and correct; otherwise None, with the reason in ``row``."""
    inputs = case.inputs[0]
    try:
        contender = build()
    except Absent as reason:
        row["absent"] = str(reason)
        return None
    try:
        with contender.serving():
            outputs, grads = case.run(contender, 0)
            outputs = [t.detach().clone() for t in outputs]
            grads = [t.detach().clone() for t in grads]
    except Exception as error:  # a peer may raise anything for a dtype, layout or device
        row["fails"] = first_line(error)
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
        if (state := status(row)) != "timed":
            lines.append(f"{name}{state}: {row[state]}")
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
