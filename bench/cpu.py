"""``python -m bench.cpu``: the CPU kernels against their peers, and whole training steps.

Everything is checked against its peers before it is timed. Contenders of a row run interleaved,
in one process, with the same threads.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from bench import cases, steps
from bench.timing import environment, interleaved, settle_allocator
from divqat.files import write_json


def measure(case: cases.Case, seconds: float) -> dict[str, Any]:
    """Check, then time a case beside copies of its memory."""
    case.check()
    targets = [torch.empty_like(t) for t in case.copied]

    def copy() -> None:
        for target, source in zip(targets, case.copied, strict=True):
            target.copy_(source)

    def clone() -> list[torch.Tensor]:
        return [source.clone() for source in case.copied]

    times = interleaved(
        {"divqat": case.ours, **case.peers, "copy": copy, "copy into fresh memory": clone}, seconds
    )
    ours = times["divqat"]["median"]
    copied = 2 * sum(t.nbytes for t in case.copied)
    bandwidth = copied / times["copy"]["median"]
    fresh_bandwidth = copied / times["copy into fresh memory"]["median"]
    return {
        "name": case.name,
        "milliseconds": times,
        "bytes": case.bytes,
        "gb_per_s": case.bytes / ours / 1e6,
        "share_of_copy": case.bytes / ours / bandwidth,
        "share_of_fresh_copy": case.bytes / ours / fresh_bandwidth,
        "speedup": {name: times[name]["median"] / ours for name in case.peers},
    }


def table(result: dict[str, Any]) -> str:
    """The Markdown table of a result."""
    lines = [
        "| forward + backward | divqat ms | times as fast as | % of a copy | % of a fresh copy |",
        "|---|---:|---|---:|---:|",
    ]
    for row in result["rows"]:
        speedups = ", ".join(f"{name} {ratio:.1f}×" for name, ratio in row["speedup"].items())
        lines.append(
            f"| {row['name']} | {row['milliseconds']['divqat']['median']:.3g} | {speedups} "
            f"| {100 * row['share_of_copy']:.0f} | {100 * row['share_of_fresh_copy']:.0f} |"
        )
    lines += ["", "| training step | ms | over fp32 |", "|---|---:|---:|"]
    for step in result["steps"]:
        fp32 = step["milliseconds"]["fp32"]["median"]
        for name, times in step["milliseconds"].items():
            ratio = times["median"] / fp32
            lines.append(f"| {step['name']}, {name} | {times['median']:.0f} | {ratio:.2f}× |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender and row")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = environment("python -m bench.cpu " + " ".join(sys.argv[1:]))
    result |= {"rows": [], "steps": []}
    for make in cases.all_cases():
        case = make()
        if args.only not in case.name:
            continue
        settle_allocator()
        result["rows"].append(measure(case, args.seconds))
        print(result["rows"][-1]["name"], result["rows"][-1]["speedup"], file=sys.stderr)
    for batch in (128,):
        name = f"ResNet-20, batch {batch}"
        if args.only in name:
            times = interleaved(steps.resnet20(batch), 10 * args.seconds)
            result["steps"].append({"name": name, "milliseconds": times})
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
