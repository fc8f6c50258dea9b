"""Steps can be captured and replayed, and have no host syncs."""

import pytest
import torch
from captured import HostReads, host_reads, plays, replay_steps
from test_train import QUIET, assert_same
from testing import no_waiting
from trainings import TINY, teach, trained

from divqat._util.files import load_checkpoint
from divqat._util.settings import ConfigError
from divqat.train import TrainConfig, budget, step, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A training of a network with few operations, but of every kind."""
    return teach(tmp_path_factory.mktemp("teacher") / "fp", model=TINY)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(precision="float16"),
        dict(method="qat", accumulate=2),
        dict(save_as_codes=True),
        dict(cache_teacher=True),
        dict(misdirect=0.5, weight=0.02, proxies=("noise", "rotated")),
    ],
    ids=["divqat", "float16", "accumulate", "codes", "cached", "misdirect"],
)
def test_a_replayed_step_gives_the_same_bits(teacher, tmp_path, monkeypatch, changes):
    """Including observers, momentum, the warm-up of λ and the learning rate."""
    settings = dict(
        model=TINY, epochs=4, freeze_observers_epoch=3, freeze_batchnorm_epoch=4, **changes
    )
    if changes.get("method") == "qat":
        settings["weight"] = 0.0
    trained(teacher, tmp_path / "eager", **settings)
    replay_steps(monkeypatch)
    plays.clear()
    trained(teacher, tmp_path / "replayed", **settings)
    # 5 full steps per epoch; three eager ones whenever something has been frozen
    assert len(plays) == 3 * 5 + 5 - 3 * 3
    assert_same(tmp_path / "eager", tmp_path / "replayed")


def test_a_weaker_defense_is_captured_again(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_within", lambda below, points: False)
    settings = dict(
        model=TINY, epochs=2, freeze_batchnorm_epoch=3, freeze_observers_epoch=3,
        accuracy_budget=1.0, misdirect=0.5, weight=0.02, proxies=("noise", "rotated"),
    )  # fmt: skip
    trained(teacher, tmp_path / "eager", **settings)
    replay_steps(monkeypatch)
    plays.clear()
    trained(teacher, tmp_path / "replayed", **settings)
    # the last epoch is repeated twice; each capture comes after three eager steps
    assert len(plays) == 2 * 5 - 3 + 2 * (5 - 3)
    assert_same(tmp_path / "eager", tmp_path / "replayed")


def test_a_graph_needs_a_gpu_and_one_process(teacher, tmp_path):
    with pytest.raises(ConfigError, match="cuda_graph: wanted one process on a GPU, got 1 on"):
        trained(teacher, tmp_path, cuda_graph=True, device="cpu")
    with pytest.raises(ConfigError, match="cuda_graph: wanted one process on a GPU, got 2 on"):
        TrainConfig(cuda_graph=True).check_world_size(2)
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["fp", "qat", "divqat"])
def test_a_step_has_no_host_sync(teacher, tmp_path, monkeypatch, method, precision):
    seen = host_reads(monkeypatch, step.Step)
    plain = dict(model=TINY, epochs=1, grad_clip=5.0, precision=precision)
    if method == "fp":
        train(TrainConfig(dataset="digits", threads=1, **plain), tmp_path, **QUIET)
    else:
        own = dict(weight=0.0) if method == "qat" else {}
        trained(teacher, tmp_path, method=method, warmup_epochs=0.5, **plain, **own)
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
