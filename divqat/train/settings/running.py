"""How and where a training is computed."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RunningSettings(Options):
    """Speed, memory, device and seed."""

    precision: str = option(
        "float32",
        "Autocast of forward and backward; scales, loss and weights stay in float32. With float16 "
        "the loss is scaled, and a step whose gradients overflow is skipped.",
        group="speed",
        choices=PRECISIONS,
    )
    compile: bool = option(
        False, "torch.compile the model, whole; the first steps take minutes.", group="speed"
    )
    cuda_graph: bool = option(
        False, "Capture the whole step once and replay it: same bits, no launches one by one.",
        group="speed",
    )  # fmt: skip
    cache_teacher: bool = option(
        False,
        "Ask the teacher about every training image once, and keep its answers in the run folder; "
        "without pad and flip, as they belong to the images as they are.",
        group="speed",
    )
    sync_batchnorm: bool = option(
        False, "With several processes: BatchNorm's statistics are those of all their images (of a "
        "part, with accumulate), not of each process's own; two collectives per BatchNorm and "
        "step until it freezes; without compile.",
        group="speed",
    )  # fmt: skip
    save_as_codes: bool = option(
        False, "Keep quantized activations for the backward pass as 8-bit codes: less memory, more "
        "time, same bits.",
        group="speed",
    )  # fmt: skip
    seed: int = option(
        0, "Everything random follows from it: initial weights, order of the images, shifts.",
        group="running", least=0,
    )  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: cuda if there.", group="running")
    threads: int | None = option(
        None, "CPU threads; None: all. The last bits of a result can depend on it.",
        group="running", least=1,
    )  # fmt: skip
    deterministic: bool = option(
        False, "Slower algorithms that give the same bits on a GPU every time.", group="running"
    )
