"""ExecuTorch programs (``.pte``) as functions from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divqat._util.bounds import MAX_MODEL, check_file
from divqat._util.errors import require

FLOAT = 6  # of torch's ScalarType, which ExecuTorch's Python interface shows as a number


def executorch_runner(path: Path) -> Callable[[Tensor], Tensor]:
    """A program with one input, float32 [1, C, H, W], and one output, float32 [1, num_classes], as
    a function of any number of images; they run one after the other.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: ExecuTorch is not installed.
        ValueError: ExecuTorch cannot load it, or it has other inputs or outputs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model: no ExecuTorch file at {path}")
    check_file(path, MAX_MODEL)
    runtime = require("executorch.runtime", "executorch")
    data = path.read_bytes()  # the file may be written again while the program runs
    try:
        program = runtime.Runtime.get().load_program(data)
        method = program.load_method("forward")
        meta = program.metadata("forward")
    except Exception as error:
        raise ValueError(f"ExecuTorch cannot load {path}: {error}") from error
    if method is None or meta.num_inputs() != 1 or meta.num_outputs() != 1:
        raise ValueError(f"{path}: wanted a program with a forward of one input and one output")
    given = meta.input_tensor_meta(0)
    sizes = list(given.sizes())
    if given.dtype() != FLOAT or len(sizes) != 4 or sizes[0] != 1:
        raise ValueError(f"{path}: wanted an input float32 [1, C, H, W], got sizes {sizes}")

    # The program does not keep its bytes alive, nor the method its program.
    def run(images: Tensor, _alive: Any = (program, data)) -> Tensor:
        if list(images.shape[1:]) != sizes[1:]:
            raise ValueError(f"images: the program wants {sizes}, got {list(images.shape)}")
        # Its outputs lie in memory that the next call overwrites.
        rows = images.cpu().contiguous().split(1)
        return torch.cat([method.execute([row])[0].clone() for row in rows])

    return run
