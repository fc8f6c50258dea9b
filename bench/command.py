"""Common parts of the commands: options, resumable results, CSV."""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.environment import SAME, environment
from divqat._util.files import read_json, write_json, write_text
from divqat._util.progress import progress

T = TypeVar("T")
Row = dict[str, Any]
DIGITS = 6  # with five, rounding twice would change some of the three digits in the tables


def add_common_arguments(parser: argparse.ArgumentParser, seconds: float | None) -> None:
    """Add options for device, threads, time and files; ``seconds`` is None for commands without a
    time per case."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.set_defaults(seconds=None, csv=None)
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="per contender and case")
    parser.add_argument("--minutes", type=float, help="start no case after this many minutes")
    parser.add_argument("--json", help="write the result here; resumes a stopped run")
    if seconds is not None:
        parser.add_argument("--csv", help="write the rows here")
        parser.add_argument("--plot", help="draw the rows here (.png, .svg, .pdf)")


def set_up(args: argparse.Namespace) -> str:
    """Set the number of threads; returns the device.

    Raises:
        SystemExit: there is no such device, or a number is not positive.
    """
    for name in ("threads", "seconds", "minutes"):
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise SystemExit(f"bench: --{name}: wanted more than 0, got {value}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: nothing to measure: no CUDA device is available")
    return device


def matches(name: str, parts: list[str] | None) -> bool:
    """Whether the name contains one of the parts, or equals one that starts with "="; None matches
    everything."""
    if parts is None:
        return True
    name, parts = name.lower(), [part.lower() for part in parts]
    return f"={name}" in parts or any(part in name for part in parts)


def status(row: Row) -> str:
    """``timed``, or the reason why there is no time: ``absent``, ``fails`` or ``wrong``."""
    return next((name for name in ("absent", "fails", "wrong") if name in row), "timed")


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def measured(
    args: argparse.Namespace,
    device: str,
    key: tuple[str, ...],
    cases: Mapping[tuple[Any, ...], T],
    measure: Callable[[T], list[Row]],
    summary: Callable[[list[Row]], str],
) -> dict[str, Any]:
    """Measure case by case; the file is complete after each.

    Args:
        args: the options.
        device: ``cpu`` or ``cuda``.
        key: columns whose values identify a case among rows.
        cases: values of these columns → case.
        measure: creates the rows of a case.
        summary: formats them for the terminal.
    """
    start = time.perf_counter()
    result = _begin(args, device)
    done = {tuple(row[name] for name in key) for row in result["rows"]}
    todo = {names: case for names, case in cases.items() if names not in done}
    for names, case in progress(todo.items(), f"bench {args.bench}", total=len(todo), unit="case"):
        if args.minutes and time.perf_counter() - start > 60 * args.minutes:
            label = ", ".join(str(name) for name in names)
            print(f"not measured after {args.minutes:g} minutes: {label}", file=sys.stderr)
            continue
        rows = rounded(measure(case))
        result["rows"] += rows
        print(summary(rows), flush=True)
        if args.json:
            write_json(args.json, result)
    if args.csv:
        write_text(args.csv, as_csv(result["rows"]))
    return result


def rounded(value: Any) -> Any:
    """``value`` with ``DIGITS`` significant digits in every float that is not a whole number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.{DIGITS}g}")
    return value


def _begin(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """A new result, or that in the file if it was started under the same conditions.

    Raises:
        SystemExit: the file has a run under other conditions.
    """
    result = environment(shlex.join(["python", "-m", "bench", *sys.argv[1:]]))
    result |= {"bench": args.bench, "device": device, "seconds": args.seconds, "rows": []}
    if not args.json or not Path(args.json).is_file():
        return result
    before = read_json(args.json)
    same = (*SAME, "bench", "device", "seconds")
    differing = [name for name in same if before.get(name) != result[name]]
    if differing:
        raise SystemExit(
            f"bench: {args.json} has a run with other {', '.join(differing)}; name another file, "
            "or remove it"
        )
    return before


def as_csv(rows: list[Row]) -> str:
    """One line per row; times in milliseconds, memory in bytes."""
    flat = []
    for row in rows:
        rest = {name: value for name, value in row.items() if name != "milliseconds"}
        times = row.get("milliseconds", {})
        flat.append(rest | {f"{name}_ms": value for name, value in times.items()})
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
