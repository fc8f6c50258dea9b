"""CUDA graphs: a function of tensors, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WARMUP = 3  # eager calls that allocate what a capture needs: workspaces, momentum, scaler state
# Takes a function; returns its output, and a function that recomputes it in the same memory.
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def cuda_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Capture ``function`` on the current stream, without running it."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: data-loader threads may allocate pinned memory during the capture.
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        output = function()
    return output, graph.replay


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the block on ``stream``, in order with the current stream; None: on the current one."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class GraphedCallable:
    """``function``, captured in a CUDA graph and replayed.

    The capture happens in the fourth call with the input shapes and constants of the first; later
    ones of these calls are replayed. Calls with other shapes or constants run eagerly.

    All other memory that ``function`` reads has to stay at its address, and its Python branches are
    fixed by the capture. All calls have to run on one stream other than the default one, as the
    nodes that accumulate gradients belong to the stream of their first use.

    Args:
        function: takes tensors; returns a tensor, which the next call overwrites.
        capture: :func:`cuda_graph`, or a stand-in where there is no GPU.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture = cuda_graph) -> None:
        self.function, self.capture = function, capture
        self.reset()

    def reset(self) -> None:
        """Discard the graph, after a change to what the function does in Python."""
        self.signature: object = None  # shapes and constants of the calls to capture
        self.calls = 0  # with this signature
        self.inputs: list[Tensor] = []
        self.captured: tuple[Tensor, Callable[[], None]] | None = None  # output, replay

    def __call__(self, *inputs: Tensor, **constants: object) -> Tensor:
        signature = [tensor.shape for tensor in inputs], constants
        if self.signature is None:
            self.signature = signature
        if signature != self.signature:
            return self.function(*inputs, **constants)
        self.calls += 1
        if self.calls <= WARMUP:
            return self.function(*inputs, **constants)
        if self.captured is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.captured = self.capture(lambda: self.function(*self.inputs, **constants))
        else:
            for static, new in zip(self.inputs, inputs, strict=True):
                static.copy_(new)
        output, replay = self.captured
        replay()
        return output
