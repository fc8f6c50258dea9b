"""``python -m bench compare``: two results of the same command, row by row.

A row is faster or slower only if the middle 60 % of the times of both runs (p20 to p80) do not
overlap; other differences are noise.
"""

from __future__ import annotations

import argparse
from statistics import geometric_mean
from typing import Any

from bench import run
from bench.command import status
from bench.environment import SAME
from divqat._util.files import read_json

KEYS = {
    "run": (*run.KEY, "contender"),
    "step": ("network", "batch", "dtype", "contender", "mode"),
    "scale": ("sweep", "size", "contender"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench compare``."""
    parser.add_argument("before", help="a result written by --json")
    parser.add_argument("after", help="another result")
    parser.add_argument("--all", action="store_true", help="also print rows without a difference")


def main(args: argparse.Namespace) -> None:
    """Print the comparison.

    Raises:
        SystemExit: the files cannot be read, or have results of different commands.
    """
    results = []
    for file in (args.before, args.after):
        try:
            result = read_json(file)
            KEYS[result["bench"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"bench compare: {file} is not a result: {error}") from error
        results.append(result)
    before, after = results
    if before["bench"] != after["bench"]:
        raise SystemExit(
            f"bench compare: wanted results of one command, got {before['bench']} and "
            f"{after['bench']}"
        )
    print(compared(before, after, args.all))


def compared(before: dict[str, Any], after: dict[str, Any], everything: bool = False) -> str:
    """The differences as text: conditions, then rows, then a summary per contender."""
    lines = [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in (*SAME, "device", "seconds")
        if before.get(name) != after.get(name)
    ]
    key = KEYS[before["bench"]]
    old = {tuple(row[name] for name in key): row for row in before["rows"]}
    new = {tuple(row[name] for name in key): row for row in after["rows"]}
    ratios: dict[str, list[float]] = {}
    for identity, row in new.items():
        label = ", ".join(str(part) for part in identity)
        if identity not in old:
            lines.append(f"only after    {label}")
            continue
        states = [status(old[identity]), status(row)]
        if states[0] != states[1]:
            lines.append(f"{states[0]} -> {states[1]}    {label}")
            continue
        if states[1] != "timed":
            continue
        was, now = old[identity]["milliseconds"], row["milliseconds"]
        ratio = now["median"] / was["median"]
        ratios.setdefault(row["contender"], []).append(ratio)
        verdict = "same"
        if now["p80"] < was["p20"]:
            verdict = "faster"
        elif now["p20"] > was["p80"]:
            verdict = "slower"
        if everything or verdict != "same":
            times = f"{was['median']:.4g} -> {now['median']:.4g} ms"
            lines.append(f"{verdict:<7}{ratio:6.2f}x  {times:<24} {label}")
    lines += [f"only before   {', '.join(map(str, i))}" for i in old.keys() - new.keys()]
    lines.append("\ntime after / time before, geometric mean:")
    for name, values in ratios.items():
        lines.append(f"  {geometric_mean(values):5.2f}x over {len(values)} rows  {name}")
    return "\n".join(lines)
