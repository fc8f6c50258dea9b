"""BatchNorm over the images of all processes against nn.BatchNorm2d in one process."""

import pytest
import torch
from test_distributed import SIZES, Collectives, batch, gradients, spawn
from test_distributed_training import assert_close, float64, interrupted
from test_train import QUIET
from testing import randn
from torch import nn
from torch.nn import functional as F

import divqat
from divqat._util.settings import ConfigError
from divqat.data import shard_rows
from divqat.quantize import freeze_batchnorm, observe_first
from divqat.train import TrainConfig, train
from divqat.train.batchnorm import synchronize_batchnorm, synchronized_batchnorm
from divqat.train.distributed import World

# 1294 images: two uneven halves per step, and a last step of 7
FP = dict(dataset="digits", model="lenet", epochs=2, batch_size=117, lr=0.01, threads=1)
STEPS = (*SIZES, 13)  # images per step, also fewer than processes; the last one is frozen
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def network():
    """In float64: a folded BatchNorm, one that is not folded, and another folded one."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)]
    layers += [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)]
    for norm in layers[1::2][:3]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    config = divqat.QuantConfig(mode="delayed")
    model = divqat.prepare(nn.Sequential(*layers), config, torch.zeros(2, 1, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.double()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def result(model, sent=()):
    """Gradients, buffers (statistics, number of batches, ranges), and collectives."""
    return gradients(model), [buffer.clone() for buffer in model.buffers()], sent


def in_parts(rank, size, count=1, whole=True):
    """The result of each step, over processes and micro-batches; with a size of 1 the expected
    result, from whole batches."""
    world, model, steps = World(rank, size), network(), []
    if whole and size > 1:
        synchronize_batchnorm(model)
    observe_first(model, [batch(STEPS[0])[0]])
    net = world.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, n in enumerate(STEPS):
        rows = shard_rows(n, (rank, size))
        if number == len(SIZES):
            freeze_batchnorm(model)
        optimizer.zero_grad()
        with Collectives() as sent:
            for part in world.micro_batches(net, *(of_all[rows] for of_all in batch(n)), n, count):
                (F.cross_entropy(net(part.images), part.index) * part.weight).backward()
        steps.append(result(model, sent.seen))
        optimizer.step()
    return steps


def values(dtype):
    """[7, 3, 2, 2] at 1000 standard deviations from 0 (bfloat16: 2), and a gradient."""
    x = randn(7, 3, 2, 2) + (2 if dtype == torch.bfloat16 else 1000)
    return x.to(dtype), randn(7, 3, 2, 2, seed=1).to(dtype)


def batchnorm(dtype):
    norm = nn.BatchNorm2d(3)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, -1, 0.5]), torch.tensor([1.0, 0, 3])
    return norm.to(dtype)


def layer(rank, dtype, rows):
    """Output, gradients of input, γ and β, and running statistics for some rows of :func:`values`.
    In the second process the first two rows are padding."""
    model = nn.Sequential(batchnorm(torch.promote_types(dtype, torch.float32)))
    synchronize_batchnorm(model)
    x, gradient = (value[rows] for value in values(dtype))
    padding = 2 if rank else 0
    gradient[:padding] = 0
    with synchronized_batchnorm(model, padding):
        y = model(x.requires_grad_())
    y.backward(gradient)
    return [y.detach()[padding:], x.grad[padding:]], gradients(model), list(model.buffers())


def everything(rank, size, folder):
    """The part of the tests that two processes run."""
    with float64():
        train(TrainConfig(**FP, sync_batchnorm=True), folder / "whole", **QUIET)
        train(TrainConfig(**FP), folder / "each", **QUIET)
    return {
        "steps": in_parts(rank, size),
        "each": in_parts(rank, size, whole=False),
        "five": in_parts(rank, size, count=5),
        "layers": [layer(rank, dtype, [[0, 1, 2, 3, 4], [0, 0, 5, 6]][rank]) for dtype in DTYPES],
        "empty": layer(rank, torch.float64, [[0, 1, 2, 3, 4, 5, 6], [0, 0]][rank]),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the trainings of two processes, and the other results of each."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *spawn(2, folder / "spawn", everything, folder)


def assert_steps(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a[:2], b[:2], rtol=1e-9, atol=1e-12)


def test_two_processes_do_the_steps_of_one(two):
    wanted = in_parts(0, 1)
    for found in two[1:]:
        assert_steps(found["steps"], wanted)
        with pytest.raises(AssertionError):
            assert_steps(found["each"][:1], wanted[:1])


def test_with_parts_all_processes_have_the_same_statistics(two):
    a, b = (found["five"] for found in two[1:])
    for one, other in zip(a, b, strict=True):  # two micro-batches of the last step have no image
        assert all(map(torch.equal, one[0] + one[1], other[0] + other[1]))
        assert all(value.isfinite().all() for value in one[0] + one[1])


def test_each_batchnorm_sends_once_each_way_until_it_is_frozen(two):
    ddp = 8 * sum(p.numel() for p in network().parameters())
    ranges = 8 * sum(b.numel() for name, b in network().named_buffers() if name.endswith("scale"))

    def wanted(*channels):
        forth, back = [8 * (2 * c + 1) for c in channels], [8 * 2 * c for c in channels]
        return [("c10d::allreduce_", size) for size in (*forth, *reversed(back), ddp, ranges)]

    for found in two[1:]:  # in the first two steps, DDP also builds its buckets
        sent = [sent for *_, sent in found["steps"][2:]]
        assert sent == [wanted(4, 4, 6)] * 3 + [wanted()]
        assert [sent for *_, sent in found["each"][2:]] == [wanted()] * 4


@pytest.mark.parametrize("number", range(4))
def test_a_layer_is_that_of_the_whole_batch(two, number):
    """Compared with nn.BatchNorm2d in float64; padding does not count."""
    dtype = (*DTYPES, torch.float64)[number]
    rows, grads, buffers = zip(
        *([*found["layers"], found["empty"]][number] for found in two[1:]), strict=True
    )
    x, gradient = (value.double() for value in values(dtype))
    norm = batchnorm(torch.float64)
    y = norm(x.requires_grad_())
    y.backward(gradient)
    # float32 rounds x, around 1000, by up to 6e-5
    close = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2}[dtype]
    close = dict(rtol=close, atol=close, check_dtype=False)
    for got, wanted in zip(map(torch.cat, zip(*rows, strict=True)), (y, x.grad), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, **close)
    for got, wanted in zip(zip(*grads, strict=True), gradients(norm), strict=True):
        torch.testing.assert_close(got[0] + got[1], wanted, **close)
    for got in buffers:
        torch.testing.assert_close(got, list(norm.buffers()), **close)


@float64()
def test_two_processes_train_what_one_does(two, tmp_path):
    interrupted(TrainConfig(**FP), tmp_path / "start", 1)
    train(TrainConfig(**FP), tmp_path / "one", **QUIET)
    assert_close(two[0] / "whole", tmp_path / "one", tmp_path / "start")
    with pytest.raises(AssertionError):
        assert_close(two[0] / "each", tmp_path / "one", tmp_path / "start")


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, momentum=None),
    ],
)
def test_other_batchnorms_are_refused(norm):
    with pytest.raises(ValueError, match=r"model: wanted nn.BatchNorm2d with γ, .*, got 0: Batch"):
        synchronize_batchnorm(nn.Sequential(norm))


def test_compile_is_refused_with_several_processes():
    config = TrainConfig(sync_batchnorm=True, compile=True)
    with pytest.raises(ConfigError, match="sync_batchnorm: wanted compile = false with 2 proc"):
        config.check_world_size(2)
