"""``python -m bench step``: whole training steps of QAT and DivQAT, compared with float training.

Forward, loss, backward and SGD with momentum, on [N, 3, H, W] in channels_last. A contender whose
loss or gradient is unrelated to that of the float model gets no time.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from bench.case import DTYPES, Absent
from bench.command import add_common_arguments, first_line, matches, measured, set_up, status
from bench.measure import Runner, costs, interleaved, settle_allocator
from bench.nets import NETWORKS
from bench.plots import plot_steps
from bench.training import FLOAT, MODES, Recipe, Setup, Step, recipes, set_up_case

FLOAT_EAGER = f"{FLOAT}, eager"


def check(step: Step, reference: Step) -> None:
    """Check that a QAT step is similar to the float step, but not identical.

    Raises:
        AssertionError: it is not, or a parameter has no gradient.
    """
    missing = [n for n, p in step.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient of {missing[0]}"
    gradient, float_gradient = step.classifier_gradient(), reference.classifier_gradient()
    cosine = F.cosine_similarity(gradient, float_gradient, 0).item()
    assert cosine > 0.9, f"gradient of the last layer: cosine {cosine:.3f} to the float one"
    assert not torch.equal(gradient, float_gradient), "nothing is quantized"
    loss, float_loss = step.value.item(), reference.value.item()
    if step.kind == "ce":
        limit = 0.2 * float_loss
        assert abs(loss - float_loss) < limit, f"loss {loss:.3f}, {float_loss:.3f} in float"


def measure(
    network: str,
    batch: int,
    dtype: str,
    device: str,
    seconds: float,
    names: list[str] | None = None,
    modes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """One row per contender and mode, always including the float model in eager mode."""
    settle_allocator()
    setup = set_up_case(network, batch, device, DTYPES[dtype])
    identity = {"network": network, "batch": batch, "dtype": dtype}
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    contenders = recipes(device)
    for name, mode in _chosen(contenders, names, modes or _modes(device)):
        label = f"{name}, {mode}"
        rows[label] = {**identity, "contender": name, "mode": mode}
        reference = steps.get(FLOAT_EAGER)
        step = admit(setup, contenders[name], mode, rows[label], reference)
        if step is not None:
            steps[label] = step
    if FLOAT_EAGER not in steps:
        return list(rows.values())  # there is nothing to compare with
    runners = {label: Runner(step, step.serving) for label, step in steps.items()}
    times = interleaved(runners, device, seconds, warmup=1, rounds=5)
    for label in steps:
        row, median = rows[label], times[label]["median"]
        row |= {
            "milliseconds": times[label],
            "images_per_s": 1e3 * batch / median,
            "over_float": median / times[FLOAT_EAGER]["median"],
            **costs(runners[label], device),
        }
        if (same_mode := f"{FLOAT}, {row['mode']}") in times:
            row["over_float_same_mode"] = median / times[same_mode]["median"]
    torch._dynamo.reset()
    gc.collect()
    return list(rows.values())


def _modes(device: str) -> tuple[str, ...]:
    return MODES if device == "cuda" else MODES[:2]


def _chosen(
    contenders: dict[str, Recipe], names: list[str] | None, modes: Iterable[str]
) -> list[tuple[str, str]]:
    """Selected contenders and modes; float training in eager mode always comes first."""
    chosen = [(FLOAT, "eager")]
    for mode in modes:
        for name, recipe in contenders.items():
            selected = name == FLOAT or matches(name, names)
            if selected and mode in recipe.modes and (name, mode) not in chosen:
                chosen.append((name, mode))
    return chosen


def admit(
    setup: Setup, recipe: Recipe, mode: str, row: dict[str, Any], reference: Step | None
) -> Step | None:
    """The step if it is available and correct; otherwise None, with the reason in ``row``."""
    try:
        step = Step(setup, recipe, mode)
        if reference is not None and row["contender"] != FLOAT:
            check(step, reference)
        return step
    except Absent as reason:
        row["absent"] = str(reason)
    except AssertionError as error:
        row["wrong"] = str(error)
    except Exception as error:  # a peer or the compiler may raise anything
        row["fails"] = first_line(error)
    return None


def summary(rows: list[dict[str, Any]]) -> str:
    """A case for the terminal."""
    first = rows[0]
    lines = [f"\n{first['network']}, batch {first['batch']}, {first['dtype']}"]
    for row in rows:
        name = f"  {row['contender'] + ', ' + row['mode']:<52}"
        if (state := status(row)) != "timed":
            lines.append(f"{name}{state}: {row[state]}")
            continue
        lines.append(
            f"{name}{row['milliseconds']['median']:9.1f} ms {row['images_per_s']:9.1f} images/s "
            f"{row['over_float']:5.2f}x float, {row['syncs']} syncs, "
            f"{row['extra_bytes'] / 2**20:.0f} MB"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench step``."""
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", help="images per step; default: by network")
    parser.add_argument(
        "--contender", action="append", help="names that contain this, or =NAME (repeatable)"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: all for the device")
    add_common_arguments(parser, seconds=5.0)


def main(args: argparse.Namespace) -> None:
    """Measure the selected steps."""
    device = set_up(args)
    if args.mode and (missing := set(args.mode) - set(_modes(device))):
        raise SystemExit(f"bench step: there is no {missing.pop()} on the {device.upper()}")
    cases = [
        (network, batch, dtype)
        for network in args.network
        for batch in args.batch or NETWORKS[network].batches[device]
        for dtype in args.dtype
    ]
    result = measured(
        args,
        device,
        ("network", "batch", "dtype"),
        {case: case for case in cases},
        lambda case: measure(*case, device, args.seconds, args.contender, args.mode),
        summary,
    )
    if args.plot:
        plot_steps(result, args.plot)
