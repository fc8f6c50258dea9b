"""Sensitivity of the layers of a finished training, measured on its validation images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divqat._util.devices import cpu_threads, find_device
from divqat._util.files import step
from divqat._util.settings import ConfigError, Options, option
from divqat.data import Splits
from divqat.data.batches import batches
from divqat.data.sets import LabeledImages
from divqat.evaluate.layers import sensitivity_bars
from divqat.quantize import mixed_precision, sensitivity
from divqat.quantize.sensitivity import WHAT
from divqat.train.folder import Run

SENSITIVITY, MIXED, PLOT = "sensitivity.json", "mixed_precision.json", "plots/sensitivity.png"


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig(Options):
    """The settings of ``divqat sensitivity``, each of which is a flag.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or two contradict each other.
    """

    what: str = option("both", "What is quantized; the rest is float.", choices=WHAT)
    bits: tuple[int, ...] | None = option(
        None, "Widths at which each weight is also measured, and from which mixed precision "
        "chooses. None: none; and 2 to 8, or 2 to 7 with unsigned activations, where 8 can "
        "saturate.", least=2, most=8,
    )  # fmt: skip
    mixed_precision: float | None = option(
        None, "Also choose the width of each layer's weight, with at most this many bits per "
        "weight on average.", least=2,
    )  # fmt: skip
    images: int | None = option(
        None, "Number of validation images, drawn at random. None: all.", least=1
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: cuda if available.")
    threads: int | None = option(None, "CPU threads. None: all.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits and self.what == "activations" and self.mixed_precision is None:
            raise ConfigError(
                f"bits: wanted none with what = activations, got {', '.join(map(str, self.bits))}"
            )
        smallest = min(self.bits or (2,))
        if self.mixed_precision is not None and self.mixed_precision < smallest:
            raise ConfigError(
                f"mixed_precision: wanted at least {smallest}, the smallest of bits, got "
                f"{self.mixed_precision:g}"
            )


class _Batches:
    """The validation images in batches; can be read again."""

    def __init__(self, images: LabeledImages, size: int = 256) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(self.images, self.size)


def sensitivity_run(run: Run, splits: Splits, settings: SensitivityConfig) -> dict[str, Any]:
    """Write ``sensitivity.json`` and ``plots/sensitivity.png`` of a run.

    Returns:
        The content of ``sensitivity.json``: :meth:`divqat.quantize.Sensitivity.to_dict` and
        ``text``, its table.

    Raises:
        ValueError: the run is not quantized.
    """
    _check_quantized(run)
    bits = () if settings.what == "activations" else settings.bits or ()

    def make() -> dict[str, Any]:
        with cpu_threads(settings.threads):
            model = run.model.to(find_device(settings.device))
            result = sensitivity(
                model, _validation(splits, settings), what=settings.what, bits=bits
            )
        return {**result.to_dict(), "text": str(result)}

    source = f"{run.fingerprint}, {settings.what}, bits {bits}, images {settings.images}"
    result = step(run.folder / SENSITIVITY, source, make)
    try:
        sensitivity_bars(result, run.folder / PLOT)
    except ImportError as error:
        result = {**result, "text": f"{result['text']}\n\nno plot: {error}"}
    return result


def mixed_precision_run(run: Run, splits: Splits, settings: SensitivityConfig) -> dict[str, Any]:
    """Write ``mixed_precision.json`` of a run, which ``divqat train --layer-bits`` reads.

    Returns:
        Its content: :meth:`divqat.quantize.MixedPrecision.to_dict` and ``text``.

    Raises:
        ValueError: the run is not quantized.
    """
    _check_quantized(run)
    budget = settings.mixed_precision
    assert budget is not None

    def make() -> dict[str, Any]:
        with cpu_threads(settings.threads):
            model = run.model.to(find_device(settings.device))
            data = _validation(splits, settings)
            result = mixed_precision(model, data, budget, bits=settings.bits)
        return {**result.to_dict(), "text": str(result)}

    source = f"{run.fingerprint}, budget {budget}, bits {settings.bits}, images {settings.images}"
    return step(run.folder / MIXED, source, make)


def what_next(run: Run, settings: SensitivityConfig) -> tuple[Path, list[str | Path]]:
    """The file with the results, and the words of the command that continues from here."""
    if settings.mixed_precision is None:
        command: list[str | Path] = ["divqat", "sensitivity", run.folder, "--mixed-precision", "4"]
        return run.folder / SENSITIVITY, command
    file, out = run.folder / MIXED, Path(f"{run.folder}-mixed")
    config = run.folder / "config.yaml"
    return file, ["divqat", "train", "--config", config, "--layer-bits", file, "--out", out]


def _validation(splits: Splits, settings: SensitivityConfig) -> _Batches:
    data = splits.validation
    if settings.images is not None and settings.images < len(data):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        data = data.subset(order[: settings.images])
    return _Batches(data)


def _check_quantized(run: Run) -> None:
    if not run.config.kind.quantized:
        raise ValueError(
            f"run: wanted a quantized training, got method {run.config.method} in {run.folder}: "
            f"divqat train --method ptq --teacher {run.folder} --out {run.folder}-ptq"
        )
