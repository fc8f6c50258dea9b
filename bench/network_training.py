"""Whether a prepared network trains with Inductor, DDP, autocast and saved codes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench import architectures
from divqat.quantize import save_as_codes

LEAST = 0.05  # of a gradient's norm: a code that rounds the other way is one of 255
PROCESSES = 2


def training_checks(prepared: nn.Module, images: Tensor) -> dict[str, Callable[[], None]]:
    """Name → a check that raises; ``prepared`` is calibrated and does not change.

    Normalization and dropout are in eval mode, so that a batch has the gradients of its parts.

    Args:
        prepared: see :func:`bench.network_checks.checks`.
        images: [N, 3, H, W], N of at least ``PROCESSES``.
    """
    wanted = gradients_of(copy.deepcopy(prepared), images)
    moved = architectures.nudged(images, torch.Generator().manual_seed(0))
    own = _error(gradients_of(copy.deepcopy(prepared), moved), wanted)
    bound = max(LEAST, 2 * own)

    def inductor() -> None:
        torch._dynamo.reset()
        model = copy.deepcopy(prepared)
        _expect_close(gradients_of(model, images, torch.compile(model)), wanted, bound)

    def saved_codes() -> None:
        model = copy.deepcopy(prepared)
        with save_as_codes(model):
            gradients = gradients_of(model, images)
        _expect_close(gradients, wanted, 0.0)

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            expect_finite(gradients_of(copy.deepcopy(prepared).train(), images))

    def distributed() -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save((prepared, images), Path(folder) / "model.pt")
            torch.multiprocessing.spawn(_process, (folder,), nprocs=PROCESSES)
            results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(PROCESSES)]
        _expect_close(results[1], results[0], 0.0)
        _expect_close(results[0], wanted, bound)

    return {
        "Inductor": inductor,
        "saved as codes": saved_codes,
        "autocast": autocast,
        "distributed": distributed,
    }


def _process(rank: int, folder: str) -> None:
    """One of the processes: its share of the images under DistributedDataParallel."""
    torch.set_num_threads(1)
    architectures.missing()  # loads the libraries, whose classes the pickle names
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    model, images = torch.load(Path(folder) / "model.pt", weights_only=False)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    torch.save(
        gradients_of(model, images.chunk(PROCESSES)[rank], parallel), Path(folder) / f"{rank}.pt"
    )
    dist.destroy_process_group()


def gradients_of(model: nn.Module, images: Tensor, call: Any = None) -> dict[str, Tensor]:
    """The gradients of ``model`` by name, for a loss that is the mean over the images."""
    output = (model if call is None else call)(images)
    architectures.tensor_of(output).float().square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def expect_finite(gradients: dict[str, Tensor]) -> None:
    """Raise unless there are gradients, and all are finite."""
    if not gradients or not all(gradient.isfinite().all() for gradient in gradients.values()):
        raise ValueError("no finite gradients")


def _expect_close(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """Raise unless all gradients together are the same but for a share of their norm."""
    if got.keys() != wanted.keys():
        raise ValueError(f"gradients of other parameters: {sorted(got.keys() ^ wanted.keys())[:3]}")
    error = _error(got, wanted)
    if not error <= bound:
        raise ValueError(f"other gradients, by {error:.3g} of their norm, wanted {bound:.3g}")


def _error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    a, b = (torch.cat([g[name].flatten() for name in wanted]) for g in (got, wanted))
    return float((a - b).norm() / b.norm())
