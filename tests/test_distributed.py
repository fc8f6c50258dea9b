"""Steps of several processes, and with micro-batches, equal those of one; gloo on the CPU."""

import multiprocessing
import traceback
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from testing import randn
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import divqat
from divqat.data import shard_rows
from divqat.nn import FakeQuantize
from divqat.quantize import observe_first, preset, sync_observers
from divqat.train.distributed import World

BUFFERS = ("running_min", "running_max", "scale", "zero_point")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def spawn(size, folder, function, *args):
    """The results of ``function(rank, size, *args)`` in ``size`` processes of one gloo group.

    On a busy machine gloo aborts now and then while its processes connect (a thread of its own is
    not joined, and there is no error to catch). As long as nothing has begun, they try again.
    """
    folder.mkdir()
    before = set(folder.parent.iterdir())

    def start():
        # Forks of one server process that has imported what trainings need and started no thread.
        packages = ["torch._dynamo", "divqat.train", "sklearn.datasets", "matplotlib.figure"]
        multiprocessing.set_forkserver_preload(packages)
        torch.multiprocessing.start_processes(
            _process, (size, folder, function, args), size, start_method="forkserver"
        )

    try:
        start()
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name != "SIGABRT" or set(folder.parent.iterdir()) != before:
            raise
        (folder / "store").unlink(missing_ok=True)
        start()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _process(rank, size, folder, function, args):
    torch.set_num_threads(1)
    options = dict(timeout=timedelta(seconds=60), rank=rank, world_size=size)
    dist.init_process_group("gloo", f"file://{folder}/store", **options)
    try:
        torch.save(function(rank, size, *args), folder / f"{rank}.pt")
    except BaseException:
        # A process that exits with running gloo threads aborts, which would hide its error.
        traceback.print_exc()
        raise
    dist.destroy_process_group()


def network():
    """Without BatchNorm and in float64, where no value is so near to the middle of two codes that
    the order of a sum matters. Two kinds of grids, with and without a ReLU before the observer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.Flatten()]
    config = replace(preset("x86", activation_bits=6), mode="delayed", first_last_bits=8)
    model = divqat.prepare(
        nn.Sequential(*layers, nn.Linear(64, 10)), config, torch.zeros(2, 1, 8, 8)
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def batch(n):
    return randn(n, 1, 8, 8, dtype=torch.float64, seed=n), torch.arange(n) % 10


SIZES = (13, 13, 16, 3, 1)  # images per step, also fewer than processes


class Collectives(TorchDispatchMode):
    """Name and bytes of every collective, including those of DistributedDataParallel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.seen.append((func.name(), sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def in_parts(rank, size, count):
    """Gradients, ranges and collectives of each step, over processes and micro-batches."""
    world, model, steps = World(rank, size), network(), []
    net = world.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def parts(n):
        rows = shard_rows(n, (rank, size))
        return world.micro_batches(net, *(whole[rows] for whole in batch(n)), n, count)

    observe_first(model, (part.images for part in parts(SIZES[0])))
    for n in SIZES:
        optimizer.zero_grad()
        with Collectives() as sent:
            for part in parts(n):
                (F.cross_entropy(net(part.images), part.index) * part.weight).backward()
        steps.append((gradients(model), state(model), sent.seen))
        optimizer.step()
    return steps


def by_hand(rank, size, count):
    """The result of :func:`in_parts`, and the ranges of each step of a custom loop."""
    steps, model, ranges = in_parts(rank, size, count), network(), []
    net = nn.parallel.DistributedDataParallel(model)
    net.broadcast_buffers = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observe_first(model, [batch(16)[0].chunk(size)[rank]])
    sync_observers(model)
    for _ in range(3):
        images, labels = (whole.chunk(size)[rank] for whole in batch(16))
        optimizer.zero_grad()
        logits = net(images)
        sync_observers(model)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        ranges.append(state(model))
    return steps, ranges


def at_once(sizes=SIZES):
    """The expected result of :func:`in_parts`, from an ordinary loop over whole batches."""
    model, steps = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observe_first(model, [batch(sizes[0])[0]])
    for n in sizes:
        images, labels = batch(n)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        steps.append((gradients(model), state(model)))
        optimizer.step()
    return steps


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def state(model):
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    return [getattr(q, name).clone() for q in quantizers for name in BUFFERS]


def assert_steps(got, wanted):
    for (grads, ranges, *_), (wanted_grads, wanted_ranges) in zip(got, wanted, strict=True):
        torch.testing.assert_close(grads, wanted_grads, rtol=1e-9, atol=1e-12)
        assert all(map(torch.equal, ranges, wanted_ranges))


@pytest.mark.parametrize("count", [2, 5])
def test_parts_of_a_batch_have_its_gradient_and_ranges(count):
    assert_steps(in_parts(0, 1, count), at_once())


@pytest.mark.parametrize(("size", "count"), [(2, 2), (4, 1), (8, 1)])
def test_processes_do_the_steps_of_one_with_two_collectives(tmp_path, size, count):
    model = network()
    ranges = sum(m.scale.numel() for m in model.modules() if isinstance(m, FakeQuantize))
    weights = sum(p.numel() for p in model.parameters())
    wanted, wanted_by_hand = at_once(), at_once([16] * 3)
    for steps, by_hands in spawn(size, tmp_path / "spawn", by_hand, count):
        assert_steps(steps, wanted)
        for got, (_, wanted_ranges) in zip(by_hands, wanted_by_hand, strict=True):
            assert all(map(torch.equal, got, wanted_ranges))
        for _, _, sent in steps[2:]:  # in the first two, DDP also builds its buckets
            # one bucket of gradients, and all ranges
            assert sent == [("c10d::allreduce_", 8 * weights), ("c10d::allreduce_", 8 * ranges)]
