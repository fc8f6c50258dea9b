"""Several processes, and several parts, train as one. Real processes, over gloo on the CPU."""

import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from test_train import assert_same
from testing import randn
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import divqat
from divqat.data import shard_rows
from divqat.files import load_checkpoint, read_json
from divqat.nn import FakeQuantize
from divqat.quantize import observe_first, preset, sync_observers
from divqat.train import TrainConfig, step, train, trainer
from divqat.train.distributed import Team

ROOT = str(Path(__file__).parent.parent)
QUIET = dict(log=lambda line: None)
BUFFERS = ("running_min", "running_max", "scale", "zero_point")
# 1294 images: two uneven halves per step, and a last step of 7. A low lr: at 0.01, one activation
# that another order of sums rounds to the next code becomes 10 % of a gradient within an epoch.
QAT = dict(
    dataset="digits", model="lenet", method="qat", epochs=2, batch_size=117, lr=0.001, threads=1,
    pad=1, ranges="delayed", freeze_batchnorm_epoch=1, freeze_observers_epoch=9,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def spawn(size, folder, function, *args):
    """The results of ``function(rank, size, *args)`` in so many processes of one gloo group.

    On a busy machine gloo aborts now and then while its processes connect (a thread of its own is
    not joined, and there is no error to catch). As long as nothing has begun, they try again.
    """
    folder.mkdir()
    before = set(folder.parent.iterdir())
    try:
        torch.multiprocessing.spawn(_process, (size, folder, function, args), nprocs=size)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name != "SIGABRT" or set(folder.parent.iterdir()) != before:
            raise
        (folder / "store").unlink(missing_ok=True)
        torch.multiprocessing.spawn(_process, (size, folder, function, args), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _process(rank, size, folder, function, args):
    torch.set_num_threads(1)
    options = dict(timeout=timedelta(seconds=60), rank=rank, world_size=size)
    dist.init_process_group("gloo", f"file://{folder}/store", **options)
    try:
        torch.save(function(rank, size, *args), folder / f"{rank}.pt")
    except BaseException:
        # Threads of gloo abort a process that ends with them, and its error would not be seen.
        traceback.print_exc()
        raise
    dist.destroy_process_group()


def network():
    """Without BatchNorm, in float64, where no value is so near the middle of two codes that the
    order of a sum decides; grids of two kinds, observed after ReLU, too."""
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


SIZES = (13, 13, 16, 3, 1)  # images per step: fewer than processes, too


class Collectives(TorchDispatchMode):
    """Everything that is sent, DistributedDataParallel's own included: name and bytes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.seen.append((func.name(), sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def in_parts(rank, size, count):
    """Gradients, ranges and collectives of each step, its batch spread over processes and parts."""
    team, model, steps = Team(rank, size), network(), []
    net = team.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def parts(n):
        rows = shard_rows(n, (rank, size))
        return team.parts(net, *(whole[rows] for whole in batch(n)), n, count)

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
    """Those of :func:`in_parts`, and the ranges of each step of a loop that is not ours."""
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
    """What :func:`in_parts` has to give: an ordinary loop over whole batches."""
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
        for _, _, sent in steps[2:]:  # in the first two, DDP settles its buckets as well
            # one bucket of gradients, and all ranges
            assert sent == [("c10d::allreduce_", 8 * weights), ("c10d::allreduce_", 8 * ranges)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "fp"
    fp = dict(dataset="digits", model="lenet", epochs=3, batch_size=64, threads=1)
    train(TrainConfig(**fp), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def one(teacher, tmp_path_factory):
    """The training that several processes have to repeat."""
    folder = tmp_path_factory.mktemp("one") / "one"
    train(TrainConfig(**QAT, teacher=str(teacher)), folder, **QUIET)
    return folder


def assert_close(folder, one, start):
    """The same training up to rounding: what differs is little of what was learned."""
    folders = (folder, one, start)
    got, wanted, first = (load_checkpoint(f / "checkpoint.pt")["model"] for f in folders)
    for name, value in wanted.items():
        if name in first and torch.is_tensor(value) and value.is_floating_point():
            moved = (value - first[name]).norm()
            assert (got[name] - value).norm() <= 2e-3 * moved, name
        elif torch.is_tensor(value):
            torch.testing.assert_close(got[name], value, rtol=2e-3, atol=1e-5)
        else:
            assert got[name] == value, name


def interrupted(config, folder, at):
    """Train, and be interrupted in the loss of step ``at``."""
    steps, loss = [], step.Step.losses

    def failing(self, *args):
        steps.append(1)
        if len(steps) == at:
            raise KeyboardInterrupt
        return loss(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step.Step, "losses", failing)
        train(config, folder, **QUIET)


def trainings(rank, size, folder, teacher):
    """Everything that is trained by two processes; returns what a NaN in one of them raises."""
    config = TrainConfig(**QAT, teacher=teacher)
    train(config, folder / "two", **QUIET)
    interrupted(config, folder / "begun-by-two", 18)  # of 12 per epoch
    train(config, folder / "begun-by-one", **QUIET)
    moving = TrainConfig(**{**QAT, "freeze_batchnorm_epoch": 9, "ranges": "auto"}, teacher=teacher)
    train(moving, folder / "norm", **QUIET)
    interrupted(moving, folder / "norm-again", 18)
    train(moving, folder / "norm-again", **QUIET)

    original, steps = trainer.batches, []

    def batches(*args, **kwargs):
        for images, labels in original(*args, **kwargs):
            steps.append(1)
            if rank == 1 and len(steps) == 16:  # the first batch shows what memory is needed
                images[0] = torch.nan  # of the second process
            yield images, labels

    trainer.batches = batches
    with pytest.raises(FloatingPointError) as error:
        train(config, folder / "nan", **QUIET)
    return str(error.value)


def test_two_processes_train_what_one_does(teacher, one, tmp_path):
    config = TrainConfig(**QAT, teacher=str(teacher))
    interrupted(config, tmp_path / "begun-by-one", 18)
    errors = spawn(2, tmp_path / "spawn", trainings, tmp_path, str(teacher))
    train(config, tmp_path / "begun-by-two", **QUIET)
    for name in ("two", "begun-by-one", "begun-by-two"):
        assert_close(tmp_path / name, one, teacher)
    assert_same(tmp_path / "norm", tmp_path / "norm-again")
    # A NaN in one process ends both with the one error.
    assert errors == ["epoch 2, step 3: the input images hold NaN or Inf"] * 2
    assert load_checkpoint(tmp_path / "nan" / "checkpoint.pt")["epoch"] == 1
    assert not (tmp_path / "nan" / "summary.json").exists()


def torchrun(*command):
    started = time.monotonic()
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    options = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    done = subprocess.run([*run, *map(str, command)], **options)
    return done, time.monotonic() - started


def flags(teacher):
    for name, value in {**QAT, "teacher": teacher}.items():
        yield from (f"--{name.replace('_', '-')}", value)


def test_torchrun(teacher, one, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "divqat", "train", "--out", out, "--accumulate", 2, *flags(teacher)]
    done, _ = torchrun(*command)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["epoch", "epoch", "test"]
    assert_close(out, one, teacher)
    names = {path.name for path in out.iterdir()}
    assert names == {"checkpoint.pt", "config.yaml", "metrics.csv", "plots", "summary.json"}


def test_processes_in_mixed_precision_with_kept_answers_codes_and_a_budget(teacher, tmp_path):
    out = tmp_path / "out"
    options = [*flags(teacher), "--method", "divqat", "--weight", 0.05, "--pad", 0]
    options += ["--precision", "bfloat16", "--cache-teacher", "--save-as-codes", "--accumulate", 2]
    options += ["--accuracy-budget", 1]
    done, _ = torchrun("-m", "divqat", "train", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert (out / "teacher_logits.pt").is_file()
    rows = load_checkpoint(out / "checkpoint.pt")["rows"]
    assert rows[-1]["divergence"] > 0 and rows[-1]["validation_accuracy"] > 0.8
    budget = read_json(out / "summary.json")["budget"]
    assert budget["inside"] and len(budget["path"]) > 1


def test_a_process_that_fails_ends_the_job(teacher, tmp_path):
    script, out = tmp_path / "fails.py", tmp_path / "out"
    script.write_text(
        "import os, sys\n"
        "from divqat.cli import main\n"
        "from divqat.train import step\n"
        "loss = step.Step.losses\n"
        "calls = []\n"
        "def failing(self, *args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 13 and os.environ['RANK'] == '1':\n"  # of 12 per epoch
        "        raise RuntimeError('out of order')\n"
        "    return loss(self, *args)\n"
        "step.Step.losses = failing\n"
        "sys.exit(main())\n"
    )
    done, seconds = torchrun(script, "train", "--out", out, *flags(teacher))
    assert done.returncode != 0 and seconds < 60
    assert "divqat (process 1 of 2): error: out of order" in done.stderr
    assert load_checkpoint(out / "checkpoint.pt")["epoch"] == 1
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "config.yaml", "metrics.csv"}
