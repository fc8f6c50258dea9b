"""The CUDA and the Triton kernels on a device: launches, streams, graphs, errors. The op suites run
there too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from testing import bits, no_waiting, randn, tensor

from divqat import ops
from divqat.ops import _native, _triton

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device is available", allow_module_level=True)
MISSING = {"cuda": _native.missing("cuda"), "triton": _triton.missing("cuda")}
if all(MISSING.values()):
    pytest.skip("; ".join(MISSING.values()), allow_module_level=True)

call = torch.ops.divqat


def counted(backend: str, function: Callable[[], object]) -> int:
    """Kernels that one call launches; a host synchronization is an error."""
    function()
    torch.cuda.synchronize()
    before = _launches[backend]()
    with no_waiting():
        function()
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


@pytest.fixture(autouse=True, params=[name for name, reason in MISSING.items() if not reason])
def kernels(request):
    with ops.backend(request.param), torch.device("cuda"):
        yield request.param


def state():
    """Buffers filled on the device: ``torch.tensor`` copies from the host, and waits for that."""
    values = [torch.full((), v) for v in (float("inf"), -float("inf"), 1.0)]
    return [*values, torch.zeros((), dtype=torch.int32)]


def everything(n, kernels="cuda"):
    """Each op on n elements, by name, with the launches that it may take."""
    exact = {"cuda": 1, "triton": 2}[kernels]
    x, grad = randn(n), randn(n, seed=1)
    q = (tensor(0.05), torch.tensor(3, dtype=torch.int32))
    mask = call.fake_quantize(x, *q, -128, 127, None, True)[1]
    lsq = (q[0], tensor(3.2), -128, 127, None)
    weights = [randn(8, 9), randn(16, 2048), randn(3)]
    logits, target = randn(64, 10), torch.arange(64) % 10
    loss = (target, tensor(0.1), 4.0, "js", "all", None, True, 0.1, -100)
    observed = {
        f"observed {mode}": (
            lambda mode=mode: call.fake_quantize_observed(
                x, *state(), 0, 255, None, 0.1, False, mode, True
            ),
            exact if mode == "exact" else 1,
        )
        for mode in ("exact", "delayed", "frozen")
    }
    return observed | {
        "fake_quantize": (lambda: call.fake_quantize(x, *q, -128, 127, None, True), 1),
        "backward": (lambda: [call.fake_quantize_backward(grad, mask)], 1),
        "lsq": (lambda: [call.fake_quantize_lsq(x, *lsq)], 1),
        "lsq backward": (lambda: call.fake_quantize_lsq_backward(grad, x, *lsq, 0.1), 1),
        "weights": (lambda: call.fake_quantize_weights(weights, -127, 127, 0), 1),
        "weights backward": (
            lambda: call.fake_quantize_weights_backward(weights, weights, -128, 127, 0),
            1,
        ),
        "loss": (lambda: call.divergence_loss(logits, -logits, *loss), 1),
    }


def test_small_inputs_under_a_memory_checker():
    for n in (1, 7, 33, 1025):
        for function, _ in everything(n).values():
            assert all(out.isfinite().all() for out in function() if out.is_floating_point())


def test_launches_and_no_host_synchronization(kernels):
    for name, (function, launches) in everything(100_003, kernels).items():
        assert counted(kernels, function) == launches, name


def test_equal_to_the_cpu_kernels_bit_for_bit():
    """But for sums, whose order differs, and exponentials."""
    for n in (1, 1023, 3_000_001):
        for name, (function, _) in everything(n).items():
            on_device = [out.cpu() for out in function()]
            with torch.device("cpu"):
                on_cpu = list(everything(n)[name][0]())
            for i, (a, b) in enumerate(zip(on_device, on_cpu, strict=True)):
                if name == "loss" or (name == "lsq backward" and i > 0):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                elif a.is_floating_point():
                    assert torch.equal(bits(a), bits(b)), (name, n)
                else:
                    assert torch.equal(a, b), (name, n)


def test_deterministic_from_run_to_run():
    for name, (function, _) in everything(1_000_003).items():
        first = [out.clone() for out in function()]
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, function(), strict=True)), name


def test_a_captured_step_replays_bit_for_bit_beside_eager_launches():
    x = randn(1 << 20)
    buffers = state()

    def step():
        y, mask = call.fake_quantize_observed(x, *buffers, 0, 255, None, 0.1, False, "exact", True)
        z = call.fake_quantize_lsq_backward(y, x, tensor_scale, offset, -128, 127, None, 1.0)
        return [y, call.fake_quantize_backward(y, mask), *z]

    tensor_scale, offset = tensor(0.05), tensor(3.0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    start = [b.clone() for b in buffers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for buffer, value in zip(buffers, start, strict=True):
            buffer.copy_(value)
        graph.replay()
        replayed = [out.clone() for out in [*captured, *buffers]]
        for buffer, value in zip(buffers, start, strict=True):
            buffer.copy_(value)
        eager = [*step(), *buffers]
        assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_two_streams_at_the_same_time():
    """Also the ops whose blocks count each other."""
    for name, (function, _) in everything(100_003).items():
        wanted = function()
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = []
        for _ in range(20):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(function())
        torch.cuda.synchronize()
        for got in results:
            assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)), name


def test_two_captured_graphs_replay_at_the_same_time():
    """Launches in graphs share no counter with each other, or with eager ones."""
    functions = {name: f for name, (f, _) in everything(100_003).items()}
    wanted = {name: [out.clone() for out in f()] for name, f in functions.items()}
    torch.cuda.synchronize()
    graphs, captured = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append({name: f() for name, f in functions.items()})
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for outputs in captured:
        for name, got in outputs.items():
            assert all(torch.equal(a, b) for a, b in zip(wanted[name], got, strict=True)), name


def test_mixed_devices_are_refused():
    x, q = randn(10_000), (tensor(0.05), torch.tensor(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="scale: wanted it on cuda:0 like x, got cpu"):
        call.fake_quantize(x, q[0].cpu(), q[1], -128, 127, None, True)


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of device memory")
    x = torch.ones(n, dtype=torch.bfloat16)
    x[-1] = 1000.0
    y, mask = call.fake_quantize(
        x, tensor(0.5), torch.tensor(0, dtype=torch.int32), -128, 127, None, True
    )
    assert y[-1] == 63.5 and (y[:-1] == 1).all()
    grad = call.fake_quantize_backward(x, mask)
    assert grad[-1] == 0 and grad[-2] == 1


def test_the_public_ops_train_on_the_device():
    x = randn(4, 3, 8, 8).requires_grad_()
    y = ops.fake_quantize_observed(x, *state(), 0, 255, relu=True)
    (w,) = ops.fake_quantize_weights([randn(5, 3, 3, 3)], -127, 127)
    logits = torch.nn.functional.conv2d(y, w).mean((2, 3))
    ops.divergence_loss(logits, -logits.detach(), torch.arange(4), weight=0.1).backward()
    assert x.grad.isfinite().all() and x.grad.any()
