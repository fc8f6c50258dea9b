"""The choice of kernels for the ops on each device, and the reasons why faster ones are missing.

On CUDA the order of preference is ``cuda`` (the compiled kernels), ``triton``, ``torch`` (the
references); on the CPU ``native`` (the compiled kernels), ``torch``. Triton serves the CPU only on
request, and only under its interpreter; ``traceable`` is only used on request.
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
# device → (backend, registration, which must be kept alive); no entry for the references.
_serving: dict[str, tuple[str, Any]] = {}
_current = "torch"  # the last requested backend


def missing(backend: str, device: str) -> str:
    """The reason why a backend cannot serve a device; empty if it can."""
    if backend in ("torch", "traceable"):
        return ""
    return _triton.missing(device) if backend == "triton" else _native.missing(device)


def best(device: str) -> str:
    """The default backend of a device."""
    return next(backend for backend in PREFERRED[device] if not missing(backend, device))


def _chosen(name: str) -> dict[str, str]:
    """device → backend, for the name of a backend; devices that it cannot serve get their default.

    Raises:
        ValueError: an unknown name.
        RuntimeError: it can serve no device here; the message says why.
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
    """Let a backend serve the ops permanently, see :func:`backend`."""
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

    * ``"cuda"`` and ``"triton"`` serve CUDA tensors (``"triton"`` also CPU tensors under
      ``TRITON_INTERPRET=1``, for tests).
    * ``"native"`` is the compiled kernels on every device for which they were built.
    * ``"torch"`` is the PyTorch references on all devices.
    * ``"traceable"`` is the same references, bit for bit, but as calls of PyTorch's own ops instead
      of ``torch.ops.divqat.*``: ``torch.compile`` traces them and Inductor fuses them with
      neighboring ops. Without a compiler it is for tests; its masks take a byte per element.

    Devices that the backend does not serve keep their default. The choice holds for the whole
    process with all its threads; compiled functions are recompiled under another choice. The
    environment variable ``DIVQAT_BACKEND`` makes the choice for a run.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is missing; the message says why.
    """
    before = _current
    use(name)
    try:
        yield
    finally:
        use(before)


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """The backend of each op.

    Returns:
        ``{op: {device: (backend, reason)}}`` with device ``"cpu"`` or ``"cuda"``, and the reason
        why no better backend serves it (empty for the best one).
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
    """Use ``DIVQAT_BACKEND``, or the default of each device."""
    first = "torch"
    if not missing("native", "cpu"):
        first = "native"
    elif not missing("triton", "cuda"):
        first = "triton"
    use(os.environ.get("DIVQAT_BACKEND") or first)
