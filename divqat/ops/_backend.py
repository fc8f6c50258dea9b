"""Which kernels serve the ops on which device, and why not faster ones.

On CUDA the order of preference is ``cuda`` (the compiled kernels), ``triton``, ``torch`` (the
references); on the CPU ``native`` (the compiled kernels), ``torch``. Triton serves the CPU only
where it is asked for, and only under its interpreter; ``traceable`` only where it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from divqat.ops import _library, _native, _triton
from divqat.ops._library import SCHEMAS

BACKENDS = ("native", "cuda", "triton", "torch", "traceable")
PREFERRED = {"cpu": ("native", "torch"), "cuda": ("cuda", "triton", "torch")}
# device → (backend, registration, which lives as long as it is kept); none for the references.
_serving: dict[str, tuple[str, Any]] = {}
_current = "torch"  # the last that was asked for


def missing(backend: str, device: str) -> str:
    """Why a backend cannot serve a device, empty where it can."""
    if backend in ("torch", "traceable"):
        return ""
    return _triton.missing(device) if backend == "triton" else _native.missing(device)


def best(device: str) -> str:
    """The backend that serves a device where none is asked for."""
    return next(backend for backend in PREFERRED[device] if not missing(backend, device))


def _chosen(name: str) -> dict[str, str]:
    """device → backend, for the name of a backend; where it cannot serve a device, the best does.

    Raises:
        ValueError: an unknown name. RuntimeError: it can serve no device here, and why.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(BACKENDS)}, got {name!r}")
    if name in ("torch", "traceable"):
        return {"cpu": "torch", "cuda": "torch"}
    chosen = {device: best(device) for device in PREFERRED}
    if name == "native":
        reason = _native.missing("cpu")
    elif name == "cuda":
        reason = _native.missing("cuda")
    else:
        able = [device for device in PREFERRED if not _triton.missing(device)]
        chosen |= dict.fromkeys(able, "triton")
        reason = "" if able else f"{_triton.missing('cuda')}; {_triton.missing('cpu')}"
    if reason:
        raise RuntimeError(f"backend: wanted {name}, but {reason}")
    return chosen


def use(name: str) -> None:
    """Let a backend serve the ops from now on: see :func:`backend`."""
    global _current
    chosen = _chosen(name)
    _current = name
    _library.traceable = name == "traceable"
    for device, wanted in chosen.items():
        if _serving.get(device, ("torch",))[0] == wanted:
            continue
        if device in _serving:
            _serving.pop(device)[1].remove()
        if wanted == "triton":
            _serving[device] = wanted, _triton.Registration(device)
        elif wanted != "torch":
            extension: Any = _native.extension
            _serving[device] = wanted, extension.Registration(device)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve the ops with other kernels inside the block.

    ``"cuda"`` and ``"triton"`` choose for CUDA tensors (``"triton"`` for CPU tensors too under
    ``TRITON_INTERPRET=1``, for tests), ``"native"`` the compiled kernels on every device that they
    were built for; what is not chosen keeps the best that there is. ``"torch"`` is the PyTorch
    references everywhere, ``"traceable"`` the same ones, bit for bit, but as calls of PyTorch's own
    ops in place of ``torch.ops.divqat.*``: ``torch.compile`` sees through them and Inductor fuses
    them with what is around. Without a compiler it is for tests; its masks take a byte per element.
    The choice holds for the whole process, all threads, and when a function is compiled: under
    another one it is compiled again.
    ``DIVQAT_BACKEND`` makes it for a run.

    Raises:
        ValueError: an unknown name. RuntimeError: the backend is absent, and why.
    """
    before = _current
    use(name)
    try:
        yield
    finally:
        use(before)


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """Which backend serves which op.

    Returns:
        ``{op: {device: (backend, reason)}}`` with device ``"cpu"`` or ``"cuda"``, and why no
        better backend serves it (empty for the best one).
    """

    def serving(name: str, device: str) -> tuple[str, str]:
        if _library.traceable:
            backend = "traceable"
        elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"divqat::{name}", device.upper()):
            backend = "torch"
        else:
            backend = _serving[device][0] if device in _serving else "native"
        first = PREFERRED[device][0]
        if backend == first:
            return backend, ""
        if device == "cuda" and not torch.cuda.is_available():
            return backend, "no CUDA device is available"
        return backend, missing(first, device) or f"the {first} kernels are switched off"

    return {name: {d: serving(name, d) for d in PREFERRED} for name in SCHEMAS}


def start() -> None:
    """Take ``DIVQAT_BACKEND``, or the best for each device."""
    first = "torch"
    if not missing("native", "cpu"):
        first = "native"
    elif not missing("triton", "cuda"):
        first = "triton"
    use(os.environ.get("DIVQAT_BACKEND") or first)
