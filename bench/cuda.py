"""``python -m bench.cuda``: the CUDA and the Triton kernels beside a copy on the same device.

``--tune`` tries other tiles for the Triton kernels instead. Times are medians of CUDA events;
inputs rotate through more memory than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import resnet50_weights
from bench.timing import environment
from divqat import ops
from divqat.files import write_json
from divqat.ops import _native, _triton

call = torch.ops.divqat
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def milliseconds(functions: list[Callable[[], object]], repeats: int = 50) -> float:
    """Median time of one call; the functions do the same on different memory, in turns."""
    for function in functions:
        function()
    times = []
    for i in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        functions[i % len(functions)]()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def counted(backend: str, function: Callable[[], object]) -> int:
    """Kernels that one call launches; a host synchronization is an error."""
    function()
    torch.cuda.synchronize()
    before = _launches[backend]()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return _launches[backend]() - before


def _triton_launches() -> int:
    """Launches of Triton kernels since the first call."""
    from triton import knobs

    if not hasattr(_triton_launches, "count"):
        _triton_launches.count = 0  # type: ignore[attr-defined]

        def count(*_: Any) -> None:
            _triton_launches.count += 1  # type: ignore[attr-defined]

        knobs.runtime.launch_enter_hook.add(count)
    return _triton_launches.count  # type: ignore[attr-defined]


def _native_launches() -> int:
    extension: Any = _native.extension
    return extension.launch_count()


_launches = {"cuda": _native_launches, "triton": _triton_launches}


def activation_ops(x: Tensor, grad: Tensor) -> dict[str, tuple[Callable[[], object], float]]:
    """op → (call, bytes per element) for a tensor of n elements."""
    size, device = x.element_size(), x.device
    qparams = (torch.tensor(0.03, device=device), torch.tensor(3, device=device).int())
    state = (
        *(torch.tensor(v, device=device) for v in (-6.0, 6.0, 0.05)),
        torch.tensor(128, device=device).int(),
    )
    offset = torch.tensor(3.0, device=device)
    mask = call.fake_quantize(x, *qparams, -128, 127, None, True)[1]
    lsq = (qparams[0], offset, -128, 127, None)

    def observed(mode: str) -> Callable[[], object]:
        rest = (0, 255, None, 0.01, False, mode, True)
        return lambda: call.fake_quantize_observed(x, *state, *rest)

    return {
        "fake_quantize": (
            lambda: call.fake_quantize(x, *qparams, -128, 127, None, True),
            2 * size + 1 / 8,
        ),
        "fake_quantize_backward": (
            lambda: call.fake_quantize_backward(grad, mask),
            2 * size + 1 / 8,
        ),
        "fake_quantize_observed exact": (observed("exact"), 3 * size + 1 / 8),
        "fake_quantize_observed delayed": (observed("delayed"), 2 * size + 1 / 8),
        "fake_quantize_lsq": (lambda: call.fake_quantize_lsq(x, *lsq), 2 * size),
        "fake_quantize_lsq_backward": (
            lambda: call.fake_quantize_lsq_backward(grad, x, *lsq, 1e-3),
            3 * size,
        ),
    }


def rows(megabytes: float, dtype: torch.dtype, backends: list[str]) -> list[dict[str, Any]]:
    """Every activation op on tensors of one size."""
    extension: Any = _native.extension
    n = int(megabytes * 2**20) // dtype.itemsize
    sets = max(2, int(400 // megabytes) + 1)  # several times the L2 cache
    inputs = [torch.randn(n, device="cuda").to(dtype) for _ in range(sets + 1)]
    target, stream = torch.empty_like(inputs[0]), torch.cuda.current_stream().cuda_stream

    def copy(source: Tensor) -> Callable[[], object]:
        return lambda: extension.copy_cuda(
            target.data_ptr(), source.data_ptr(), source.nbytes, stream
        )

    bandwidth = 2 * target.nbytes / milliseconds([copy(x) for x in inputs])
    variants = [activation_ops(inputs[i], inputs[i + 1]) for i in range(sets)]
    results = []
    for name, (_, size) in variants[0].items():
        for backend in backends:
            with ops.backend(backend):
                time = milliseconds([variant[name][0] for variant in variants])
                launches = counted(backend, variants[0][name][0])
            results.append(
                {
                    "name": f"{name}, {megabytes:g} MB {str(dtype).removeprefix('torch.')}",
                    "backend": backend,
                    "milliseconds": time,
                    "gb_per_s": size * n / time / 1e6,
                    "share_of_copy": size * n / time / bandwidth,
                    "launches": launches,
                }
            )
    return results


def small_rows(backends: list[str]) -> list[dict[str, Any]]:
    """What is bound by launches rather than bytes: all weights of ResNet-50, and the loss."""
    weights = [w.cuda() for w in resnet50_weights()]
    grads = [torch.randn_like(w) for w in weights]
    logits, teacher = (torch.randn(1024, 1000, device="cuda") for _ in range(2))
    target = torch.randint(0, 1000, (1024,), device="cuda")
    weight, one = torch.tensor(0.1, device="cuda"), torch.ones((), device="cuda")
    loss = (target, weight, 4.0, "student_teacher", "all", None, False, 0.0, -100)
    functions: dict[str, Callable[[], object]] = {
        "fake_quantize_weights, ResNet-50": lambda: call.fake_quantize_weights(
            weights, -127, 127, 0
        ),
        "fake_quantize_weights_backward, ResNet-50": lambda: call.fake_quantize_weights_backward(
            grads, weights, -128, 127, 0
        ),
        "divergence_loss, [1024, 1000]": lambda: call.divergence_loss(logits, teacher, *loss),
        "divergence_loss_backward, [1024, 1000]": lambda: call.divergence_loss_backward(
            logits, one
        ),
    }
    results = []
    for name, function in functions.items():
        for backend in backends:
            with ops.backend(backend):
                row = {"name": name, "backend": backend, "milliseconds": milliseconds([function])}
                results.append(row | {"launches": counted(backend, function)})
    return results


def tuned() -> list[dict[str, Any]]:
    """The Triton kernels with other tiles and warps, on activations of 64 MB."""
    from divqat.kernels import _channels, divergence_loss, fake_quantize, fake_quantize_observed

    modules: list[Any] = [divergence_loss, fake_quantize, fake_quantize_observed]
    results, plan = [], _channels.plan
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)):

        def other(*args: Any, block: int = block, warps: int = warps) -> Any:
            grid, meta = plan(*args)
            return grid, meta | {"BLOCK_K": block // meta["BLOCK_C"], "num_warps": warps}

        choice = {"BLOCK": block, "num_warps": warps}
        with contextlib.ExitStack() as stack:
            for module in modules:
                replaced = mock.patch.object(module, "block_of", lambda *_, c=choice: c)
                stack.enter_context(replaced)
            for name in ("fake_quantize_observed", "fake_quantize_lsq"):
                stack.enter_context(mock.patch(f"divqat.kernels.{name}.plan", other))
            for dtype in DTYPES.values():
                results += [row | choice for row in rows(64, dtype, ["triton"])]
    return sorted(results, key=lambda row: (row["name"], row["milliseconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 16, 64, 256, 1024, 2048])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--tune", action="store_true", help="compare tiles of the Triton kernels")
    args = parser.parse_args()
    missing = {"cuda": _native.missing("cuda"), "triton": _triton.missing("cuda")}
    # the extension has the copy that all is compared with
    if not torch.cuda.is_available() or missing["cuda"]:
        reason = missing["cuda"] or "no CUDA device is available"
        raise SystemExit(f"bench.cuda: nothing to measure: {reason}")
    backends = [name for name, reason in missing.items() if not reason]
    result: dict[str, Any] = environment("python -m bench.cuda " + " ".join(sys.argv[1:]))
    result |= {"device": torch.cuda.get_device_name(), "absent": missing}
    if args.tune:
        result["rows"] = tuned()
    else:
        result["rows"] = small_rows(backends)
        for dtype in DTYPES.values():
            for megabytes in args.megabytes:
                result["rows"] += rows(megabytes, dtype, backends)
    for row in result["rows"]:
        share = f"{100 * row['share_of_copy']:5.0f} % of a copy" if "share_of_copy" in row else ""
        tile = f"{row['BLOCK']:5} x{row['num_warps']}" if "BLOCK" in row else ""
        what = f"{row['name']:<55}{row['backend']:<7}{tile}"
        print(f"{what}{row['milliseconds']:9.4f} ms {row['launches']:3} launches {share}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
