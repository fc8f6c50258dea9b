"""Several processes train the same model as one; over gloo on the CPU, and with torchrun."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_distributed import spawn
from test_train import QUIET, assert_same
from torch import nn
from trainings import TINY

from divqat._util.files import load_checkpoint, read_json
from divqat.nn import MovingAverageMinMaxObserver
from divqat.train import TrainConfig, objective, train, trainer

ROOT = str(Path(__file__).parent.parent)
# 1294 images: two uneven halves per step, and a last step of 7.
QAT = dict(
    dataset="digits", model=TINY, method="qat", epochs=2, batch_size=117, lr=0.001, threads=1,
    pad=1, ranges="delayed", freeze_batchnorm_epoch=1, freeze_observers_epoch=9,
)  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "fp"
    fp = dict(dataset="digits", model=TINY, lr=0.2, epochs=3, batch_size=64, threads=1)
    with float64():
        train(TrainConfig(**fp), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def one(teacher, tmp_path_factory):
    """The training that several processes have to reproduce."""
    folder = tmp_path_factory.mktemp("one") / "one"
    with float64():
        train(TrainConfig(**QAT, teacher=str(teacher)), folder, **QUIET)
    return folder


@contextmanager
def float64():
    """Within this block trainings compute in float64.

    In float32 no bound holds: another order of sums, another instruction set, rounds one activation
    to the next code, which is 10 % of a gradient within an epoch. In float64 two orders of a sum of
    n terms differ by n ε Σ|x| at most, and hardly ever is a value so near to the middle of two
    codes.
    """

    def register(module, name, value):  # ranges are float32 in every network
        own = value.to(torch.float32) if value.is_floating_point() else value
        nn.Module.register_buffer(module, name, own)

    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # logits, pictures
        patch.setattr(MovingAverageMinMaxObserver, "register_buffer", register)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


# n ε Σ|x| for 24 steps that each add gradients of 117 images at 64 positions, times ten, as errors
# grow in the following layers and steps.
REORDERED = 10 * 24 * 117 * 64 * torch.finfo(torch.float64).eps


def assert_close(folder, one, start):
    """Assert that two trainings differ only by the order of their sums: by a small fraction of what
    was learned, and for float32 values by one rounding."""
    folders = (folder, one, start)
    got, wanted, first = (load_checkpoint(f / "checkpoint.pt")["model"] for f in folders)
    for name, value in wanted.items():
        if name in first and torch.is_tensor(value) and value.is_floating_point():
            assert value.dtype == torch.float64, name
            moved = (value - first[name]).norm()
            assert (got[name] - value).norm() <= REORDERED * moved, name
        elif torch.is_tensor(value):
            torch.testing.assert_close(got[name], value, rtol=2**-23, atol=0)
        else:
            assert got[name] == value, name


def interrupted(config, folder, at):
    """Train, interrupted in the loss of step ``at``."""
    steps, loss = [], objective.Objective.loss_on_images

    def failing(self, *args):
        steps.append(1)
        if len(steps) == at:
            raise KeyboardInterrupt
        return loss(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objective.Objective, "loss_on_images", failing)
        train(config, folder, **QUIET)


@float64()
def trainings(rank, size, folder, teacher):
    """The trainings of two processes. Returns the error after a NaN in one of them."""
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
            if rank == 1 and len(steps) == 15:  # of 12 per epoch
                images[0] = torch.nan  # of the second process
            yield images, labels

    trainer.batches = batches
    with pytest.raises(FloatingPointError) as error:
        train(config, folder / "nan", **QUIET)
    return str(error.value)


@float64()
def test_two_processes_train_what_one_does(teacher, one, tmp_path):
    config = TrainConfig(**QAT, teacher=str(teacher))
    interrupted(config, tmp_path / "begun-by-one", 18)
    errors = spawn(2, tmp_path / "spawn", trainings, tmp_path, str(teacher))
    train(config, tmp_path / "begun-by-two", **QUIET)
    for name in ("two", "begun-by-one", "begun-by-two"):
        assert_close(tmp_path / name, one, teacher)
    assert_same(tmp_path / "norm", tmp_path / "norm-again")
    # A NaN in one process ends both with the same error.
    assert errors == ["epoch 2, step 3: the input images contain NaN or Inf"] * 2
    assert load_checkpoint(tmp_path / "nan" / "checkpoint.pt")["epoch"] == 1
    assert not (tmp_path / "nan" / "summary.json").exists()


def torchrun(*command):
    started = time.monotonic()
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests"}
    options = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    done = subprocess.run([*run, *map(str, command)], **options)
    return done, time.monotonic() - started


def flags(teacher):
    for name, value in {**QAT, "teacher": teacher}.items():
        yield from (f"--{name.replace('_', '-')}", value)


def test_torchrun(teacher, one, tmp_path):
    script, out = tmp_path / "float64.py", tmp_path / "out"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from divqat.cli import main\n"
        "from test_distributed_training import float64\n"
        "with float64():\n"
        "    sys.exit(main())\n"
    )
    done, _ = torchrun(script, "train", "--out", out, "--accumulate", 2, *flags(teacher))
    assert done.returncode == 0, done.stderr
    said = [line.split()[0] for line in done.stdout.splitlines()]
    assert said == ["epoch", "epoch", "test", "results", "next"]
    assert_close(out, one, teacher)
    names = {path.name for path in out.iterdir()}
    assert names == {"checkpoint.pt", "config.yaml", "metrics.csv", "plots", "summary.json"}


MIXED = dict(
    method="divqat", weight=0.05, pad=0, precision="bfloat16", cache_teacher=True, accumulate=2,
    save_as_codes=True, accuracy_budget=1,
)  # fmt: skip


def in_mixed_precision(rank, size, folder, teacher):
    train(TrainConfig(**{**QAT, **MIXED}, teacher=teacher), folder / "out", **QUIET)


def test_processes_in_mixed_precision_with_kept_answers_codes_and_a_budget(teacher, tmp_path):
    spawn(2, tmp_path / "spawn", in_mixed_precision, tmp_path, str(teacher))
    out = tmp_path / "out"
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
        "from divqat.train import objective\n"
        "loss = objective.Objective.loss_on_images\n"
        "calls = []\n"
        "def failing(self, *args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 13 and os.environ['RANK'] == '1':\n"  # of 12 per epoch
        "        raise RuntimeError('out of order')\n"
        "    return loss(self, *args)\n"
        "objective.Objective.loss_on_images = failing\n"
        "sys.exit(main())\n"
    )
    done, seconds = torchrun(script, "train", "--out", out, *flags(teacher))
    assert done.returncode != 0 and seconds < 60
    assert "divqat (process 1 of 2): error: out of order" in done.stderr
    assert load_checkpoint(out / "checkpoint.pt")["epoch"] == 1
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "config.yaml", "metrics.csv"}
