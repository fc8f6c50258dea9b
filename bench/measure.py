"""Costs of one call: time, launches, host syncs, memory. Contenders take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

CALLS_PER_TURN = 8  # on CUDA, where the host runs ahead within a turn


def settle_allocator() -> None:
    """Let glibc keep freed memory of up to 64 MB instead of returning it to the system.

    Its threshold follows the largest block freed so far, up to 32 MB; a training process has freed
    one early on. Without this call the first measured sizes would pay for new pages, and later ones
    would not.
    """
    block = torch.ones(31 * 2**18)
    del block


@dataclass
class Runner:
    """A contender that is ready.

    Attributes:
        call: performs the ``i``-th call; ``i`` selects inputs that take turns.
        serving: a context for its calls; entering it is not timed.
    """

    call: Callable[[int], object]
    serving: Callable[[], AbstractContextManager[None]] = nullcontext


def interleaved(
    runners: dict[str, Runner],
    device: str,
    seconds: float = 1.0,
    warmup: int = 3,
    rounds: int = 7,
) -> dict[str, dict[str, float]]:
    """Let the contenders take turns, A B C C B A …, for about ``seconds`` each.

    Args:
        runners: the contenders by name.
        device: ``cpu`` or ``cuda``.
        seconds: time per contender.
        warmup: calls before the measurement.
        rounds: minimum number of turns each.

    Returns:
        For each name ``median``, ``p20`` and ``p80`` in milliseconds, and the number of ``rounds``.
        On CUDA it is the time between events on the device; the host runs ahead, unless the
        contender makes it wait.
    """
    turn = _cuda_turn if device == "cuda" else _cpu_turn
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        with runner.serving():
            for i in range(warmup):
                runner.call(i)
    done, deadline = 0, time.perf_counter() + seconds * len(runners)
    while time.perf_counter() < deadline or done < rounds:
        names = list(runners) if done % 2 == 0 else list(reversed(runners))
        for name in names:
            with runners[name].serving():
                times[name] += turn(runners[name].call, done)
        done += 1
    return {name: _summary(values) for name, values in times.items()}


def _cpu_turn(call: Callable[[int], object], done: int) -> list[float]:
    start = time.perf_counter()
    call(done)
    return [1e3 * (time.perf_counter() - start)]


def _cuda_turn(call: Callable[[int], object], done: int) -> list[float]:
    first = done * CALLS_PER_TURN
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS_PER_TURN + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host gets ahead
    events[0].record()
    for i in range(CALLS_PER_TURN):
        call(first + i)
        events[i + 1].record()
    torch.cuda.synchronize()
    return [events[i].elapsed_time(events[i + 1]) for i in range(CALLS_PER_TURN)]


def _summary(values: list[float]) -> dict[str, float]:
    quintiles = statistics.quantiles(values, n=5)
    return {
        "median": statistics.median(values),
        "p20": quintiles[0],
        "p80": quintiles[3],
        "rounds": len(values),
    }


def enqueue_microseconds(runner: Runner, calls: int = 20) -> float:
    """Median host time of a call on CUDA, starting from an empty queue."""
    times = []
    with runner.serving():
        for i in range(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            runner.call(i)
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def costs(runner: Runner, device: str) -> dict[str, float | None]:
    """Costs of one call according to the profiler.

    Returns:
        ``launches``: kernels, copies and fills on the device (None on the CPU).
        ``operators``: PyTorch operators that the host dispatches; a compiled graph counts as one.
        ``syncs``: number of times that the host waits for the device; on the CPU, that it reads a
        tensor's value (where it would wait on a GPU).
        ``extra_bytes``: peak memory minus the memory in use before.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    memory = device == "cpu"
    with runner.serving(), profile(activities=activities, profile_memory=memory) as profiler:
        kept = runner.call(0)
    del kept
    # Raw events: for a large model, building the tree of profiler.events() takes minutes.
    events = profiler.profiler.kineto_results.events()
    result: dict[str, float | None] = {"operators": _outermost_operators(events)}
    if device == "cuda":
        on_device = [
            e for e in events if e.device_type().name == "CUDA" and not e.is_user_annotation()
        ]
        waits = ("cudaStreamSynchronize", "cudaEventSynchronize")
        return result | {
            "launches": len(on_device) or None,  # no events: the profiler cannot see the device
            "syncs": sum(e.name() in waits for e in events) if on_device else None,
            "extra_bytes": torch.cuda.max_memory_allocated() - before,
        }
    return result | {
        "launches": None,
        "syncs": sum(e.name() == "aten::_local_scalar_dense" for e in events),
        "extra_bytes": _peak(events),
    }


def _outermost_operators(events: list[Any]) -> int:
    """The number of operators and compiled graphs that are not called by another one."""
    spans = sorted(
        (e.start_thread_id(), e.start_ns(), -e.end_ns())
        for e in events
        if e.device_type().name == "CPU" and _is_operator(e.name())
    )
    count, thread, until = 0, None, 0
    for thread_id, start, minus_end in spans:
        if thread_id != thread or start >= until:
            count += 1
            thread, until = thread_id, -minus_end
    return count


def _is_operator(name: str) -> bool:
    return ("::" in name and not name.startswith("autograd::")) or "Call CompiledFxGraph" in name


def _peak(events: list[Any]) -> int:
    """The highest sum of the allocations and frees on the CPU."""
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, nbytes in sorted(memory, key=lambda item: item[0]):
        now += nbytes
        peak = max(peak, now)
    return peak


def saved_bytes(forward: Callable[[], object], alive: list[Tensor]) -> int:
    """Bytes that a forward saves by ``save_for_backward``, counting each storage once.

    Attributes of an ``autograd.Function`` do not pass the hooks: the gradient that
    ``divergence_loss`` computes in its forward is only part of ``extra_bytes``.

    Args:
        forward: the call.
        alive: tensors that exist anyway and do not count.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # kept while counting: the address of a freed storage could be reused
    for tensor in alive:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del kept
    return sum(storages.values())
