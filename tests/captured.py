"""A training step that is captured and replayed, or watched for what it reads and whom it asks."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from divqat.train import graph, step, trainer
from divqat.train import run as loop

plays = []


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: operations on fixed memory, played without Python.

    Unlike a graph it runs the operations while it takes them down, so it begins by keeping what
    they overwrite, and puts it back.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for tensor in reads:
            key = tensor.untyped_storage().data_ptr()
            if key not in self.made and key not in self.before:
                whole = tensor.detach().as_strided(
                    (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0
                )
                self.before[key] = whole, whole.clone()
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.made.add(tensor.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, output))
        return output

    @torch.inference_mode()  # which may write to what was made in it, and to anything else
    def play(self):
        plays.append(1)
        for func, args, kwargs, outputs in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tape(function):
    """Stands for :func:`divqat.train.graph.cuda_graph`."""
    recorded = Tape()
    with recorded:
        output = function()
    for whole, kept in recorded.before.values():
        whole.copy_(kept)
    return output, recorded.play


def replay_steps(monkeypatch, capture=tape):
    """From here on trainings replay their steps, captured by ``capture``."""

    class Replaying(trainer.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.run_step = graph.GraphedCallable(self.step, capture)

    monkeypatch.setattr(loop, "Trainer", Replaying)


class HostReads(TorchDispatchMode):
    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split("::")[-1].split(".")[0] in self.READS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def host_reads(monkeypatch, *owners):
    """A list that gets what each call of an object of these classes reads on the host."""
    seen = []
    for owner in owners:

        def watched(self, *args, original=owner.__call__, **kwargs):
            with HostReads() as reads:
                result = original(self, *args, **kwargs)
            seen.append(reads.seen)
            return result

        monkeypatch.setattr(owner, "__call__", watched)
    return seen


def teachers(monkeypatch):
    """A list that gets the network that each step can ask, or None."""
    seen, original = [], step.Step.__call__

    def watched(self, *args, **kwargs):
        seen.append(self.teacher)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(step.Step, "__call__", watched)
    return seen
