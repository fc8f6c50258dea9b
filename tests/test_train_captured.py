"""A step is a function of tensors: it is captured and replayed, and reads nothing on the host."""

import pytest
import torch
from test_train import QUIET, assert_same
from testing import no_waiting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainings import trained

from divqat.files import load_checkpoint
from divqat.options import ConfigError
from divqat.train import TrainConfig, graph, loop, step, train, trainer

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


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(precision="float16", model="lenet"),
        dict(method="qat", accumulate=2),
        dict(save_as_codes=True),
        dict(cache_teacher=True),
        dict(misdirect=0.5, weight=0.02, proxies=("noise", "rotated")),
    ],
    ids=["divqat", "float16", "accumulate", "codes", "cached", "misdirect"],
)
def test_a_replayed_step_is_the_step_bit_for_bit(
    vgg_teacher, lenet_teacher, tmp_path, monkeypatch, changes
):
    """Observers' buffers, momentum, the rise of λ and the learning rate included."""
    teacher = lenet_teacher if changes.get("model") == "lenet" else vgg_teacher
    settings = dict(epochs=4, freeze_observers_epoch=3, freeze_batchnorm_epoch=4, **changes)
    if changes.get("method") == "qat":
        settings["weight"] = 0.0
    trained(teacher, tmp_path / "eager", **settings)

    class Replaying(trainer.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.do_step = graph.Captured(self.step, tape)

    monkeypatch.setattr(loop, "Trainer", Replaying)
    plays.clear()
    trained(teacher, tmp_path / "replayed", **settings)
    # 5 full steps per epoch; three to warm up whenever something has been frozen
    assert len(plays) == 3 * 5 + 5 - 3 * 3
    assert_same(tmp_path / "eager", tmp_path / "replayed")


def test_a_graph_wants_a_gpu_and_one_process(vgg_teacher, tmp_path):
    with pytest.raises(ConfigError, match="cuda_graph: wanted one process on a GPU, got 1 on"):
        trained(vgg_teacher, tmp_path, cuda_graph=True, device="cpu")
    with pytest.raises(ConfigError, match="cuda_graph: wanted one process on a GPU, got 2 on"):
        TrainConfig(cuda_graph=True).check_team(2)
    with pytest.raises(ConfigError, match="cuda_graph: wanted optimizer sgd"):
        TrainConfig(cuda_graph=True, optimizer="lamb")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_graph(vgg_teacher, tmp_path, precision):
    settings = dict(precision=precision, device="cuda", deterministic=True)
    trained(vgg_teacher, tmp_path / "eager", **settings)
    trained(vgg_teacher, tmp_path / "graph", cuda_graph=True, **settings)
    states = [load_checkpoint(tmp_path / f / "checkpoint.pt") for f in ("eager", "graph")]
    for name, value in states[0]["model"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1]["model"][name]), name


class HostReads(TorchDispatchMode):
    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split("::")[-1].split(".")[0] in self.READS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["fp", "qat", "divqat"])
def test_a_step_reads_nothing_on_the_host(lenet_teacher, tmp_path, monkeypatch, method, precision):
    seen, original = [], step.Step.__call__

    def watched(self, *args, **kwargs):
        with HostReads() as reads:
            result = original(self, *args, **kwargs)
        seen.append(reads.seen)
        return result

    monkeypatch.setattr(step.Step, "__call__", watched)
    plain = dict(model="lenet", epochs=1, grad_clip=5.0, precision=precision)
    if method == "fp":
        train(TrainConfig(dataset="digits", threads=1, **plain), tmp_path, **QUIET)
    else:
        own = dict(weight=0.0) if method == "qat" else {}
        trained(lenet_teacher, tmp_path, method=method, warmup_epochs=0.5, **plain, **own)
    assert len(seen) > 3 and not any(seen)
    with HostReads() as reads:
        torch.ones(()).item()
    assert reads.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_does_not_wait_for_the_gpu(vgg_teacher, tmp_path, monkeypatch, precision):
    original = step.Step.__call__

    def strict(self, *args, **kwargs):
        with no_waiting():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(step.Step, "__call__", strict)
    trained(vgg_teacher, tmp_path, precision=precision, device="cuda", cache_teacher=True)
