"""Untrusted ONNX files: checks before they are run, and a bound on their memory.

An ONNX file is a program. ONNX Runtime restricts it to tensors, but lets it use any amount of
memory and time; the memory is bounded here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from divqat._util.bounds import MAX_MODEL, check_file
from divqat._util.errors import require
from divqat._util.memory import free_memory

SHARE = 0.75  # of the memory that is free when the first file is opened, for all sessions together
STATUS = Path("/proc/self/statm")


def open_session(path: Path, *, exact: bool) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU for a file that passed :func:`check_onnx`.

    Args:
        path: the file.
        exact: with ``session.x64quantprecision`` and the options that it needs.

    Raises:
        ValueError: ONNX Runtime cannot run it.
    """
    onnxruntime = require("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; texts from the file stay off the terminal
    if _bound_memory():
        options.add_session_config_entry("session.use_env_allocators", "1")
    more = {}
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
        # ConstantSharing would merge zero points that are separate in the file.
        more["disabled_optimizers"] = ["ConstantSharing"]
    try:
        with _bounded_process():
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], **more
            )
    except Exception as error:
        raise ValueError(f"ONNX Runtime cannot open {path}: {error}") from error


def check_onnx(path: Path) -> None:
    """Check that a file is an ONNX file whose external weights lie within its folder.

    Raises:
        ValueError: it is not.
        FileNotFoundError: a file with external weights is missing.
    """
    model = read_onnx(path)
    onnx = require("onnx", "export")
    folder = path.parent.resolve()
    for tensor in _tensors(model, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            weights = folder / entries.get("location", "")
            if not weights.resolve().is_relative_to(folder):
                raise ValueError(f"{path} refers to weights outside its folder, in {weights}")
            check_file(weights)


def read_onnx(path: Path) -> Any:
    """The ``onnx.ModelProto`` of a file, without weights that lie in other files.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: onnx is missing.
        ValueError: it is no ONNX file.
    """
    onnx = require("onnx", "export")
    check_file(path, MAX_MODEL)
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ValueError(f"{path} is no ONNX file: {error}") from error


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """All tensors in a message: weights and attributes, also in subgraphs and functions."""
    if isinstance(message, kind):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if hasattr(value, "__len__") else [value]:
                yield from _tensors(part, kind)


def _free_memory() -> int | None:
    return free_memory(torch.device("cpu"))


@contextmanager
def _bounded_process() -> Iterator[None]:
    """A block in which this process cannot use more than the free memory (on Linux): while it opens
    a file, ONNX Runtime folds constants without its allocator."""
    free = _free_memory()
    if free is None or not STATUS.is_file():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(STATUS.read_text().split()[0]) * resource.getpagesize() + free
    if before[0] == resource.RLIM_INFINITY or limit < before[0]:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@functools.cache
def _bound_memory() -> bool:
    """Register a bounded allocator with ONNX Runtime; False if the free memory is unknown."""
    onnxruntime, free = require("onnxruntime", "export"), _free_memory()
    if free is None:
        return False
    arena = onnxruntime.OrtArenaCfg({"max_mem": int(SHARE * free), "arena_extend_strategy": 1})
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, arena)
    return True
