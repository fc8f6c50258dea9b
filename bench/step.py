"""``python -m bench step``: whole training steps: what QAT and DivQAT cost over float training.

Forward, loss, backward and SGD with momentum, on [N, 3, H, W] in channels_last. A contender whose
loss or gradient has nothing to do with the float model's gets no time.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import divqat
from bench import qat_models
from bench.case import DTYPES, Absent, our_backends
from bench.command import add_common_arguments, first_line, matches, measured, set_up
from bench.measure import Runner, costs, interleaved, settle_allocator
from bench.nets import NETWORKS
from divqat import ops

FLOAT = "float"
FLOAT_EAGER = f"{FLOAT}, eager"
LEARNING_RATE = 1e-6  # so that all contenders stay at the same weights while they are timed
MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "CUDA graph")}


@dataclass
class Setup:
    """What all contenders of a case have in common."""

    model: nn.Module  # float, in training mode
    teacher: nn.Module  # the same, in eval mode
    x: Tensor  # [N, 3, H, W]
    target: Tensor  # [N]
    teacher_logits: Tensor  # [N, classes]
    device: str
    dtype: torch.dtype
    pool: Any  # of all captured graphs: each reads nothing that another one has written


def set_up_case(network: str, batch: int, device: str, dtype: torch.dtype) -> Setup:
    """Model and data, with running statistics that fit the data."""
    net = NETWORKS[network]
    torch.manual_seed(0)
    model = net.build().to(device, memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, net.size, net.size).to(device, memory_format=torch.channels_last)
    target = torch.randint(0, net.classes, (batch,)).to(device)
    with torch.no_grad():
        for _ in range(10):
            model(x)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = teacher(x)
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    return Setup(model, teacher, x, target, logits, device, dtype, pool)


@dataclass
class Recipe:
    """How a contender trains.

    Attributes:
        prepare: float model and one batch → model.
        loss: ``ce``, or DivQAT's with the ``teacher`` run in the step, or its logits ``cached``.
        backend: names the divqat backend, if it is one of ours, or raises :class:`Absent`.
        whole: it can be compiled, and captured, without a break.
    """

    prepare: qat_models.Prepare
    loss: str = "ce"
    backend: Callable[[], str] | None = None
    whole: bool = True


def recipes(device: str) -> dict[str, Recipe]:
    """Name → contender."""
    found = {
        FLOAT: Recipe(lambda model, x: copy.deepcopy(model)),
        "torch.ao FakeQuantize": Recipe(qat_models.torch_ao(fused=False), whole=False),
        "torch.ao fused": Recipe(qat_models.torch_ao(fused=True), whole=False),
        "torchao PT2E": Recipe(qat_models.pt2e, whole=False),
        "Brevitas": Recipe(qat_models.brevitas, whole=False),
        "PyTorch": Recipe(qat_models.pure_pytorch),
    }
    for name, backend in our_backends(device).items():
        if name == "divqat torch":  # the fallback, for comparison
            found[name] = Recipe(qat_models.ours(), backend=backend, whole=False)
            continue
        found[name] = Recipe(qat_models.ours(), backend=backend)
        found[f"{name}, delayed"] = Recipe(qat_models.ours("delayed"), backend=backend)
        for loss, label in (("teacher", "teacher in the step"), ("cached", "cached teacher")):
            found[f"{name}, DivQAT, {label}"] = Recipe(qat_models.ours(), loss, backend)
    return found


class Step:
    """A training step of a contender. Its gradients are the model's until the next one."""

    def __init__(self, setup: Setup, recipe: Recipe, mode: str) -> None:
        self.backend = recipe.backend() if recipe.backend else None
        self.setup = setup
        self.kind = recipe.loss
        self.model = recipe.prepare(setup.model, setup.x).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.loss = divqat.nn.DivQATLoss(weight=0.05, temperature=4.0).to(setup.device)
        self.compute: Callable[[], Tensor] = self._compute
        self.graph: Any = None
        with self.serving():
            self.value = self._step()  # the first batch sets ranges: it is no step to time
            if mode == "compiled":
                self.compute = torch.compile(self._compute, fullgraph=True, dynamic=False)
            elif mode == "CUDA graph":
                self._capture()
            self()

    def serving(self) -> AbstractContextManager[None]:
        """A block in which the step can be called."""
        return nullcontext() if self.backend is None else ops.backend(self.backend)

    def _compute(self) -> Tensor:
        setup = self.setup
        with torch.autocast(setup.device, setup.dtype, enabled=setup.dtype != torch.float32):
            logits = self.model(setup.x)
            if self.kind == "ce":
                return F.cross_entropy(logits, setup.target)
            teacher_logits = setup.teacher_logits
            if self.kind == "teacher":
                with torch.no_grad():
                    teacher_logits = setup.teacher(setup.x)
            return self.loss(logits, setup.target, teacher_logits)

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        value = self.compute()
        value.backward()
        self.optimizer.step()
        return value.detach()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.setup.pool):
            value = self.compute()
            value.backward()
            self.optimizer.step()
        self.value = value.detach()

    def __call__(self, i: int = 0) -> None:
        if self.graph is None:
            self.value = self._step()
        else:
            self.graph.replay()

    def classifier_gradient(self) -> Tensor:
        """Of the last layer's weight, flat, float32."""
        grads = [p.grad for p in self.model.parameters() if p.dim() == 2 and p.grad is not None]
        return grads[-1].detach().float().flatten()


def check(step: Step, reference: Step) -> None:
    """A step of QAT is like the float step, but not the same.

    Raises:
        AssertionError: it is not, or a parameter has no gradient.
    """
    missing = [n for n, p in step.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient of {missing[0]}"
    mine, gradient = step.classifier_gradient(), reference.classifier_gradient()
    cosine = F.cosine_similarity(mine, gradient, 0).item()
    assert cosine > 0.9, f"gradient of the last layer: cosine {cosine:.3f} to the float one"
    assert not torch.equal(mine, gradient), "nothing is quantized"
    found, value = step.value.item(), reference.value.item()
    if step.kind == "ce":
        assert abs(found - value) < 0.2 * value, f"loss {found:.3f}, {value:.3f} in float"


def measure(
    network: str,
    batch: int,
    dtype: str,
    device: str,
    seconds: float,
    names: list[str] | None = None,
    modes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """One row per contender and mode; the float model in eager mode is always among them."""
    settle_allocator()
    setup = set_up_case(network, batch, device, DTYPES[dtype])
    identity = {"network": network, "batch": batch, "dtype": dtype}
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, mode in _chosen(device, names, modes):
        label = f"{name}, {mode}"
        rows[label] = {**identity, "contender": name, "mode": mode}
        recipe, reference = recipes(device)[name], steps.get(FLOAT_EAGER)
        step = admitted(setup, recipe, mode, rows[label], reference)
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


def _chosen(device: str, names: list[str] | None, modes: list[str] | None) -> list[tuple[str, str]]:
    """Contenders and modes; float training in eager mode comes first, whatever was asked for."""
    chosen = [(FLOAT, "eager")]
    for mode in modes or MODES[device]:
        for name, recipe in recipes(device).items():
            wanted = name == FLOAT or matches(name, names)
            if wanted and (recipe.whole or mode == "eager") and (name, mode) not in chosen:
                chosen.append((name, mode))
    return chosen


def admitted(
    setup: Setup, recipe: Recipe, mode: str, row: dict[str, Any], reference: Step | None
) -> Step | None:
    """The step, if it is there and right; else ``row`` says what it is."""
    try:
        step = Step(setup, recipe, mode)
        if reference is not None and row["contender"] != FLOAT:
            check(step, reference)
        return step
    except Absent as reason:
        row["absent"] = str(reason)
    except AssertionError as error:
        row["wrong"] = str(error)
    except Exception as error:  # whatever a peer, or the compiler, raises
        row["fails"] = first_line(error)
    return None


def summary(rows: list[dict[str, Any]]) -> str:
    """A case for the terminal."""
    first = rows[0]
    lines = [f"\n{first['network']}, batch {first['batch']}, {first['dtype']}"]
    for row in rows:
        name = f"  {row['contender'] + ', ' + row['mode']:<52}"
        status = next((s for s in ("absent", "fails", "wrong") if s in row), None)
        if status:
            lines.append(f"{name}{status}: {row[status]}")
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
    parser.add_argument("--contender", action="append", help="names that contain this (repeatable)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument(
        "--mode", nargs="+", choices=MODES["cuda"], help="default: all of the device"
    )
    add_common_arguments(parser, seconds=5.0)


def main(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    device = set_up(args)
    if args.mode and (missing := set(args.mode) - set(MODES[device])):
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
        from bench.plots import plot_steps

        plot_steps(result, args.plot)
