"""OpenVINO models (``.xml`` with weights in ``.bin``) as functions from images to logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divqat._util.bounds import MAX_MODEL, check_file
from divqat._util.errors import require
from divqat.victim.padding import in_batches


class OpenVINORunner:
    """A model with one input, float32 [N, C, H, W], and one output, [N, num_classes], on the CPU.

    Attributes:
        compiled: the ``openvino.CompiledModel``, with default options.

    Raises:
        FileNotFoundError: there is no such file, or none with its weights.
        ImportError: OpenVINO is not installed.
        ValueError: OpenVINO cannot load it, or it has other inputs or outputs.
    """

    def __init__(self, path: Path) -> None:
        weights = path.with_suffix(".bin")
        for file in (path, weights):
            if not file.is_file():
                raise FileNotFoundError(f"model: no OpenVINO file at {file}")
            check_file(file, MAX_MODEL)
        openvino = require("openvino", "openvino")
        core = openvino.Core()
        try:
            # From memory: the files may be written again while the model runs.
            model = core.read_model(path.read_bytes(), weights.read_bytes())
            self.compiled = core.compile_model(model, "CPU")
        except Exception as error:
            raise ValueError(f"OpenVINO cannot load {path}: {_reason(error)}") from error
        got = ", ".join(str(port) for port in (*model.inputs, *model.outputs))
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ValueError(f"{path}: wanted a model of one input and one output, got {got}")
        given = model.input(0)
        self._shape: Any = given.partial_shape
        if given.element_type != openvino.Type.f32 or self._shape.rank != 4:
            raise ValueError(f"{path}: wanted an input float32 [N, C, H, W], got {got}")

    def __call__(self, images: Tensor) -> Tensor:
        wanted = [entry.get_length() if entry.is_static else None for entry in self._shape]
        sizes = zip(wanted[1:], images.shape[1:], strict=True)
        if any(size not in (None, got) for size, got in sizes):
            raise ValueError(f"images: the model wants {self._shape}, got {list(images.shape)}")
        return in_batches(self._run, images.cpu(), wanted[0], "the OpenVINO input")

    def _run(self, images: Tensor) -> Tensor:
        # The result lies in memory that the next call overwrites.
        return torch.from_numpy(self.compiled(images.numpy())[0].copy())


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message; the others name its source files."""
    return str(error).strip().rpartition("\n")[2]
