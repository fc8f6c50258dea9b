"""CUDA graphs: a function of tensors, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WARMUP = 3  # calls that create what a capture must find: workspaces, momentum, a scaler's state
# function → its output, and what computes it again in the same memory
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def cuda_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Capture ``function`` on the current stream, without running it."""
    graph = torch.cuda.CUDAGraph()
    # Threads of a data loader may allocate pinned memory meanwhile: no matter to this stream.
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        output = function()
    return output, graph.replay


@contextmanager
def own_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the block on ``stream``, after all before it and before all after it; None: as ever."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Captured:
    """``function``, replayed from the fourth call that is like the first one: of inputs of these
    shapes, and with these constants.

    What else it reads has to stay where it is in memory; what it decides in Python is decided
    when it is captured. All calls have to be on one stream that is not the default one: the
    nodes that accumulate gradients belong to the stream of their first use. Other calls run as
    ever.

    Args:
        function: of tensors, to one tensor, which is overwritten by the next call.
        capture: :func:`cuda_graph`, or what stands for it where there is no GPU.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture = cuda_graph) -> None:
        self.function, self.capture = function, capture
        self.reset()

    def reset(self) -> None:
        """Forget the graph: what the function decides in Python has changed."""
        self.kind: object = None  # shapes and constants of the calls that are captured
        self.calls = 0  # of this kind
        self.inputs: list[Tensor] = []
        self.captured: tuple[Tensor, Callable[[], None]] | None = None  # output, replay

    def __call__(self, *inputs: Tensor, **constants: object) -> Tensor:
        kind = [tensor.shape for tensor in inputs], constants
        if self.kind is None:
            self.kind = kind
        if kind != self.kind:
            return self.function(*inputs, **constants)
        self.calls += 1
        if self.calls <= WARMUP:
            return self.function(*inputs, **constants)
        if self.captured is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.captured = self.capture(lambda: self.function(*self.inputs, **constants))
        else:
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)
        output, replay = self.captured
        replay()
        return output
