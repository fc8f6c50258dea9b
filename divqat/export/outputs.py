"""Comparison of all outputs of an exported model with those of the trained one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from divqat._util.modes import modes_kept
from divqat.export.arguments import arguments
from divqat.quantize.checks import as_call
from divqat.victim.runners import open_onnx


def verify_outputs(
    model: nn.Module, path: str | Path, inputs: Any, *, precise: bool = False
) -> dict[str, float]:
    """Compare all outputs of a prepared model in eval mode with those of its ONNX file: for models
    of vectors, with several inputs or outputs, for regression or reconstruction.

    Args:
        model: made by :func:`divqat.prepare` or :func:`divqat.convert`.
        path: a file written by ``export_onnx``.
        inputs: float32 [N, …], or the arguments as for ``export_onnx``.
        precise: with ONNX Runtime's option ``session.x64quantprecision``.

    Returns:
        By the name of each output, its largest |difference| relative to its largest magnitude.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        FileNotFoundError: there is no file at ``path``.
        ValueError: the file is no ONNX file, or its outputs have other shapes.
    """
    names, (args, kwargs) = arguments(model, inputs).names, as_call(inputs)
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments.values()
    tensors = [value.cpu().numpy() for value in given if isinstance(value, Tensor)]
    session = open_onnx(Path(path), precise=precise)
    read = {entry.name for entry in session.get_inputs()}
    feed = {name: t for name, t in zip(names, tensors, strict=True) if name in read}
    with modes_kept(model), torch.no_grad():
        answer = pytree.tree_leaves(model.eval()(*args, **kwargs))
    found = {}
    results = zip(session.get_outputs(), session.run(None, feed), answer, strict=True)
    for entry, got, wanted in results:
        if list(got.shape) != list(wanted.shape):
            raise ValueError(
                f"path: wanted an output {entry.name} of {list(wanted.shape)}, got "
                f"{list(got.shape)}"
            )
        difference = (torch.from_numpy(got) - wanted.cpu()).abs().max().item()
        found[entry.name] = difference / max(wanted.abs().max().item(), 1e-12)
    return found
