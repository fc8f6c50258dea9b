"""Training steps that are captured and replayed, or watched for host syncs and their teacher."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from divqat.train import graph, step, trainer
from divqat.train import run as loop

plays = []


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: records operations on fixed memory and replays them.

    Unlike a graph it runs the operations while it records them; ``before`` keeps the tensors that
    they overwrite, to restore them afterwards.
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

    @torch.inference_mode()  # may write to inference tensors and to others
    def play(self):
        plays.append(1)
        for func, args, kwargs, outputs in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tape(function):
    """A stand-in for :func:`divqat.train.graph.cuda_graph`."""
    recorded = Tape()
    with recorded:
        output = function()
    for whole, copy in recorded.before.values():
        whole.copy_(copy)
    return output, recorded.play


def replay_steps(monkeypatch, capture=tape):
    """Make trainings capture their steps with ``capture`` and replay them."""

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
    """A list that records, for each call of an object of these classes, its host syncs."""
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
    """A list that records the teacher of each step, or None."""
    seen, original = [], step.Step.__call__

    def watched(self, *args, **kwargs):
        seen.append(self.teacher)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(step.Step, "__call__", watched)
    return seen
