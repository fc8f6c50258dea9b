"""Markdown tables of results; every table has the command that reproduces it."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import geometric_mean, mean, stdev
from typing import Any

from bench.case import COPY
from bench.command import Row, status
from bench.curves import SWEEPS, curves, exponent
from bench.training import FLOAT
from bench.variants import VARIANTS

# columns of the table of ops: the names per op of an alternative that shares one column
ATEN = "ATen's own op"
ALIASES = {
    "torch.fake_quantize_per_tensor_affine": ATEN,
    "torch.fake_quantize_per_channel_affine": ATEN,
    "ATen learnable": ATEN,
}


def head(result: dict[str, Any]) -> str:
    """Command, hardware, versions and date of a result, in one paragraph."""
    versions = result["versions"]
    names = ("torch", "triton", "torchao", "brevitas", "liger-kernel")
    packages = ", ".join(f"{name} {versions.get(name, 'not installed')}" for name in names)
    gpu = result["gpu"]
    device = f"; {gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else ""
    kernels = "".join(
        f", {name.upper()} kernels {state.partition(' (')[0]}"
        for name, state in result["native_kernels"].items()
        if not state.startswith("none")
    )
    return (
        f"`{result['command']}`  \n"
        f"({result['hardware']}{device}{kernels}; {packages}; commit {result['commit']}, "
        f"{result['date']})"
    )


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cases(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """(op, dtype, layout, on) → contender → row."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = row["op"], row["dtype"], row["layout"], row["on"]
        cases.setdefault(key, {})[row["contender"]] = row
    return cases


def _ours(names: Iterable[str]) -> str:
    return next(name for name in names if name.startswith("divqat"))


def ops(result: dict[str, Any]) -> str:
    """Speedup over each alternative: geometric means over the shapes."""
    groups: dict[tuple[str, ...], list[dict[str, Row]]] = {}
    for (*group, _), case in _cases(result["rows"]).items():
        groups.setdefault(tuple(group), []).append(case)
    best = _ours(row["contender"] for row in result["rows"])
    names = dict.fromkeys(
        ALIASES.get(row["contender"], row["contender"])
        for row in result["rows"]
        if row["contender"] not in (best, COPY) and status(row) != "absent"
    )
    lines = []
    for (op, dtype, layout), cases in groups.items():
        shares = [case[best]["share_of_copy"] for case in cases if "milliseconds" in case[best]]
        line = [
            f"`--op {op} --dtype {dtype} --layout {layout}`",
            f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %",
        ]
        lines.append(line + [_speedup(cases, best, name) for name in names])
    header = ["`python -m bench run` …", f"{best}: share of a copy", *names]
    return _table(header, lines) + "\n\n" + "  \n".join(_notes(result["rows"]))


def _speedup(cases: list[dict[str, Row]], best: str, column: str) -> str:
    rows = [
        (case[best], row)
        for case in cases
        for name, row in case.items()
        if ALIASES.get(name, name) == column
    ]
    ratios = [
        theirs["milliseconds"]["median"] / mine["milliseconds"]["median"]
        for mine, theirs in rows
        if status(mine) == status(theirs) == "timed"
    ]
    if ratios:
        return f"{geometric_mean(ratios):.1f}×"
    return status(rows[0][1]) if rows else ""


def _notes(rows: list[Row]) -> list[str]:
    """The contenders that are absent, fail or are wrong, with ops and reasons."""
    all_ops = {row["op"] for row in rows}
    groups: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for row in rows:
        state = status(row)
        if state != "timed":
            # without the amount of the error, which differs from row to row
            reason = row[state].partition(":")[0] if state == "wrong" else row[state]
            names, ops = groups.setdefault((state, reason), ({}, {}))
            names[row["contender"]] = None
            ops[row["op"]] = None
    lines = []
    for (state, reason), (names, ops) in groups.items():
        where = "" if set(ops) == all_ops else f" on {', '.join(ops)}"
        lines.append(f"*{state}*{where}: {'; '.join(names)} ({reason})")
    return lines


def costs(result: dict[str, Any]) -> str:
    """Costs that do not depend on the machine: dispatches, host syncs, memory. One shape per op."""
    launches = "launches" if result["device"] == "cuda" else "operators"
    lines = []
    seen = set()
    for (op, dtype, layout, on), case in _cases(result["rows"]).items():
        if (op, dtype) in seen or layout != "contiguous":
            continue
        seen.add((op, dtype))
        for name, row in case.items():
            if name == COPY or "milliseconds" not in row:
                continue
            share = case[COPY]["bytes"] / 2  # bytes of the input: a copy reads and writes them
            values = [row[launches], row["syncs"]]
            memory = [row[kind] / share for kind in ("extra_bytes", "saved_bytes")]
            cells = [str(v) for v in values] + [f"{v:.2f}" for v in memory]
            lines.append([f"{op}, {on}, {dtype}", name, *cells])
    header = ["on", "contender", launches, "host reads", "extra memory", "kept for the backward"]
    return _table(header, lines)


def cases(result: dict[str, Any]) -> str:
    """Median milliseconds of all rows, with a table per op."""
    tables = []
    by_op: dict[str, dict[tuple[str, ...], dict[str, Row]]] = {}
    for (op, *rest), case in _cases(result["rows"]).items():
        by_op.setdefault(op, {})[tuple(rest)] = case
    for op, members in by_op.items():
        names = dict.fromkeys(
            name for case in members.values() for name, row in case.items() if "milliseconds" in row
        )
        lines = []
        for (dtype, layout, on), case in members.items():
            cells = [
                f"{case[name]['milliseconds']['median']:.3g}"
                if "milliseconds" in case.get(name, {})
                else (status(case[name]) if name in case else "")
                for name in names
            ]
            lines.append([f"{on}, {dtype}, {layout}", *cells])
        tables.append(f"### {op}\n\n" + _table(["ms, forward + backward", *names], lines))
    return "\n\n".join(tables)


def steps(result: dict[str, Any]) -> str:
    """Time of a training step relative to float training, with a column per network and batch."""
    columns = dict.fromkeys((r["network"], r["batch"], r["dtype"]) for r in result["rows"])
    lines: dict[tuple[str, str], dict[tuple[Any, ...], str]] = {}
    for row in result["rows"]:
        cells = lines.setdefault((row["contender"], row["mode"]), {})
        state = status(row)
        text = state
        if state == "timed":
            milliseconds = row["milliseconds"]["median"]
            text = f"{row['over_float']:.2f}× ({milliseconds:.0f} ms, {_mb(row)} MB)"
            if row["contender"] == FLOAT and row["mode"] == "eager":
                text = f"{milliseconds:.0f} ms, {row['images_per_s']:.0f} images/s, {_mb(row)} MB"
        cells[row["network"], row["batch"], row["dtype"]] = text
    header = ["training step", *(f"{n}, batch {b}, {d}" for n, b, d in columns)]
    body = [
        [f"{name}, {mode}", *(cells.get(c, "") for c in columns)]
        for (name, mode), cells in lines.items()
    ]
    notes = {
        f"*{status(row)}:* {row['contender']}, {row['mode']}: {row[status(row)]}": None
        for row in result["rows"]
        if status(row) != "timed"
    }
    return "\n\n".join([_table(header, body), *(["  \n".join(notes)] if notes else [])])


def _mb(row: Row) -> str:
    return f"{row['extra_bytes'] / 2**20:.0f}"


def scaling(result: dict[str, Any]) -> str:
    """The exponents of time and of extra memory, with a column per sweep."""
    rows = result["rows"]
    sweeps = [sweep for sweep in SWEEPS if curves(rows, sweep)]
    names = dict.fromkeys(row["contender"] for row in rows if "milliseconds" in row)
    lines = []
    for name in names:
        line = [name]
        for sweep in sweeps:
            cells = []
            for value in ("milliseconds", "extra_bytes"):
                x, y = curves(rows, sweep, value).get(name, ([], []))
                if len(x) >= 2 and min(y) > 0:
                    k, error = exponent(x, y)
                    text = f"{k:.2f}" if error is None else f"{k:.2f} ± {error:.2f}"
                    cells.append(text.replace("-0.00", "0.00"))
            line.append(" / ".join(cells))
        lines.append(line)
    header = ["exponent of time / of extra memory", *(f"{sweep}" for sweep in sweeps)]
    return _table(header, lines)


def accuracy(result: dict[str, Any]) -> str:
    """Test accuracies: mean and standard deviation over the seeds, and the difference."""
    by_variant: dict[str, dict[int, Row]] = {}
    for row in result["rows"]:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    lines = []
    for name, rows in by_variant.items():
        base = by_variant.get(VARIANTS[name].base, {})
        line = [name, str(len(rows))]
        for method in ("fp", "qat"):
            values = {seed: 100 * row[method]["test_accuracy"] for seed, row in rows.items()}
            line.append(_mean(list(values.values())))
            shared = [
                v - 100 * base[s][method]["test_accuracy"] for s, v in values.items() if s in base
            ]
            line.append(_mean(shared, "+") if shared and base is not rows else "")
        line.append(f"{mean(100 * row['qat']['waiting'] for row in rows.values()):.1f} %")
        lines.append(line)
    header = ["Fashion-MNIST", "seeds", "full precision", "difference", "QAT", "difference"]
    return _table([*header, "QAT's time waiting for images"], lines)


def _accuracies(rows: dict[int, Row], method: str) -> dict[int, float]:
    return {seed: 100 * row[method]["test_accuracy"] for seed, row in rows.items()}


def _mean(values: list[float], sign: str = "") -> str:
    text = f"{mean(values):{sign}.2f}"
    return f"{text} ± {stdev(values):.2f}" if len(values) > 1 else text


def host(result: dict[str, Any]) -> str:
    """Host time of a call of each Triton op."""
    by_op: dict[str, dict[str, Row]] = {}
    for row in result["rows"]:
        by_op.setdefault(row["op"], {})[row["contender"]] = row
    lines = [
        [
            name,
            str(rows["op"]["launches"]),
            *(f"{1e3 * row['milliseconds']['median']:.1f}" for row in rows.values()),
        ]
        for name, rows in by_op.items()
    ]
    return _table(["op", "launches", "op µs", "bare launches µs"], lines)
