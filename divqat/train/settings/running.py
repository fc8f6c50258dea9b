"""Settings of speed, device and seed."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RunningSettings(Options):
    """Speed, memory, device and seed."""

    precision: str = option(
        "float32",
        "Autocast dtype of the model; scales, loss and weights stay in float32. float16 uses loss "
        "scaling and skips steps whose gradients overflow.",
        group="speed",
        choices=PRECISIONS,
    )
    compile: bool = option(
        False, "torch.compile the whole model; the first steps take minutes.", group="speed"
    )
    cuda_graph: bool = option(
        False, "Capture the whole step in a CUDA graph and replay it: same bits, fewer launches.",
        group="speed",
    )  # fmt: skip
    cache_teacher: bool = option(
        False,
        "Compute the teacher's logits once per training image and cache them in the run folder; "
        "excludes pad and flip, which change the images.",
        group="speed",
    )
    sync_batchnorm: bool = option(
        False, "With several processes: compute BatchNorm statistics over the images of all (per "
        "micro-batch, with accumulate); two collectives per BatchNorm and step until it freezes; "
        "excludes compile.",
        group="speed",
    )  # fmt: skip
    save_as_codes: bool = option(
        False, "Save quantized activations for the backward pass as 8-bit codes: less memory, more "
        "time, same bits.",
        group="speed",
    )  # fmt: skip
    seed: int = option(
        0, "Seed of all random numbers: initial weights, order of the images, augmentation.",
        group="running", least=0,
    )  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: cuda if available.", group="running")
    threads: int | None = option(
        None, "CPU threads; None: all. The last bits of a result can depend on it.",
        group="running", least=1,
    )  # fmt: skip
    deterministic: bool = option(
        False,
        "Use deterministic algorithms: slower, but the same bits on every run on a GPU.",
        group="running",
    )
