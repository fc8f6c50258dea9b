import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from divqat._util.files import load_checkpoint, read_json
from divqat._util.seeds import derived_seed
from divqat.nn import FakeQuantize
from divqat.train import TrainConfig, load_run, objective, train, trainer

QUIET = dict(log=lambda line: None)
FP = dict(dataset="digits", model="lenet", batch_size=128, epochs=2, threads=1, pad=1)
SMALL = dict(dataset="digits", model="lenet", batch_size=256, epochs=4, lr=0.01, threads=1, pad=1)
DIVQAT = dict(method="divqat", weight=0.1, guard=True, warmup_epochs=1.5, grad_clip=5.0)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "fp"
    train(TrainConfig(**{**FP, "epochs": 5, "batch_size": 64}), folder, **QUIET)
    return folder


@pytest.fixture(scope="session")
def qat(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat") / "qat"
    train(config(teacher, method="qat"), folder, **QUIET)
    return folder


@pytest.fixture(scope="session")
def divqat(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("divqat") / "divqat"
    train(config(teacher, **DIVQAT), folder, **QUIET)
    return folder


def config(teacher, **changes):
    return TrainConfig(**{**SMALL, "teacher": str(teacher), **changes})


def assert_same(a, b):
    """Assert that two run folders hold the same bits, including optimizer and metrics."""
    a, b = (load_checkpoint(Path(folder) / "checkpoint.pt") for folder in (a, b))
    assert a["epoch"] == b["epoch"]
    assert_equal(a["model"], b["model"])
    assert_equal(a["optimizer"]["state"], b["optimizer"]["state"])
    for x, y in zip(a["rows"], b["rows"], strict=True):
        timed = ("ms_per_step", "waiting", "seconds")
        assert {k: v for k, v in x.items() if k not in timed} == {
            k: v for k, v in y.items() if k not in timed
        }


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        elif isinstance(value, dict):
            assert_equal(value, b[key])
        else:
            assert value == b[key], key


def test_full_precision_learns(teacher):
    summary = read_json(teacher / "summary.json")
    assert summary["test_accuracy"] > 0.8
    with open(teacher / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("12345")
    assert float(rows[4]["ce"]) < float(rows[0]["ce"])
    assert rows[0]["divergence"] == ""
    assert (teacher / "plots" / "training.png").is_file()
    assert "method: fp" in (teacher / "config.yaml").read_text()


def test_quantized_runs_start_from_the_teacher_and_train_all_weights(teacher, qat):
    start, end = load_run(teacher).model, load_run(qat).model
    assert any(isinstance(module, FakeQuantize) for module in end.modules())
    fp = dict(start.named_parameters())
    moved = [not torch.equal(p, fp[name]) for name, p in end.named_parameters() if name in fp]
    assert moved and all(moved)
    assert read_json(qat / "summary.json")["test_accuracy"] > 0.8


@pytest.mark.slow
def test_defense_without_weight_is_plain_qat_bit_for_bit(teacher, qat, tmp_path):
    train(config(teacher, **{**DIVQAT, "weight": 0.0, "grad_clip": None}), tmp_path, **QUIET)
    ours, theirs = (load_checkpoint(f / "checkpoint.pt")["model"] for f in (tmp_path, qat))
    assert_equal(ours, theirs)


def test_defense_diverges_from_the_teacher(divqat, qat):
    rows = load_checkpoint(divqat / "checkpoint.pt")["rows"]
    assert rows[-1]["divergence"] > rows[0]["divergence"] > 0
    assert rows[-1]["loss"] < rows[-1]["ce"]
    assert load_run(divqat).fingerprint != load_run(qat).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_interrupted_run_ends_with_the_same_bits(teacher, divqat, tmp_path, monkeypatch, epoch):
    def log(line):
        if line.startswith(f"epoch {epoch}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(teacher, **DIVQAT), tmp_path, log=log)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == epoch
    assert not (tmp_path / "summary.json").exists()
    lines = []
    train(config(teacher, **DIVQAT), tmp_path, log=lines.append)
    assert f"resuming after epoch {epoch} of 4" in lines[0]
    assert_same(tmp_path, divqat)


@pytest.mark.slow
def test_an_interrupted_epoch_is_repeated(teacher, divqat, tmp_path, monkeypatch):
    steps, check = [], objective.Objective.loss_on_images

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 8:  # of 6 per epoch
            raise KeyboardInterrupt
        return check(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objective.Objective, "loss_on_images", interrupted)
        train(config(teacher, **DIVQAT), tmp_path, **QUIET)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1
    train(config(teacher, **DIVQAT), tmp_path, **QUIET)
    assert_same(tmp_path, divqat)


KILLED = """
import os, signal, sys
from divqat import cli
from divqat._util import files
from divqat.train import run as loop

def write(folder, state, write=loop.write_checkpoint):
    if state["epoch"] == 2:
        files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    write(folder, state)

loop.write_checkpoint = write
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(teacher, divqat, tmp_path):
    """The process is killed while it writes the checkpoint of its second epoch."""
    command = [sys.executable, "-c", KILLED, "train", "--out", str(tmp_path)]
    command += ["--teacher", str(teacher), "--epochs", "4", "--lr", "0.01", "--batch-size", "256"]
    command += ["--threads", "1", "--pad", "1", "--method", "divqat", "--weight", "0.1", "--guard"]
    command += ["--warmup-epochs", "1.5", "--grad-clip", "5"]
    root = str(Path(__file__).parent.parent)
    killed = subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1
    assert len(list(tmp_path.glob(".divqat-*.tmp"))) == 1  # the unfinished checkpoint
    train(config(teacher, **DIVQAT), tmp_path, **QUIET)
    assert not list(tmp_path.glob(".divqat-*.tmp"))
    assert_same(tmp_path, divqat)


def test_finished_run_is_left_alone(qat, teacher):
    before = (qat / "checkpoint.pt").stat().st_mtime_ns
    lines = []
    summary = train(config(teacher, method="qat"), qat, log=lines.append)
    assert summary == read_json(qat / "summary.json")
    assert "done" in lines[0] and (qat / "checkpoint.pt").stat().st_mtime_ns == before


def test_folder_with_other_settings_is_refused(qat, teacher):
    with pytest.raises(ValueError, match=r"lr: 0.01 -> 0.02; momentum: 0.9 -> 0.8"):
        train(config(teacher, method="qat", lr=0.02, momentum=0.8), qat, **QUIET)


def test_settings_that_neither_training_uses_may_change(qat, divqat, teacher):
    train(config(teacher, method="qat", proxies=("noise",), ini_delta=0.5), qat, **QUIET)
    with pytest.raises(ValueError, match=r"misdirect: 0\.0 -> 0\.2; proxies: "):
        train(config(teacher, method="divqat", misdirect=0.2, proxies=("noise",)), divqat, **QUIET)


def test_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable divqat checkpoint"):
        train(TrainConfig(**FP), tmp_path, **QUIET)
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not from a training: no config, epoch"):
        load_run(tmp_path)


def test_teacher_must_match(teacher, qat, tmp_path):
    with pytest.raises(FileNotFoundError, match="no training at"):
        train(config(tmp_path / "nothing", method="qat"), tmp_path / "a", **QUIET)
    with pytest.raises(ValueError, match="wanted a full-precision training, got method qat"):
        train(config(qat, method="qat"), tmp_path / "b", **QUIET)
    with pytest.raises(ValueError, match=r"model: wanted lenet as in .*, got vgg_small"):
        train(config(teacher, method="qat", model="vgg_small"), tmp_path / "c", **QUIET)
    assert not any(tmp_path.iterdir())


def test_unfinished_teacher_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**FP), tmp_path / "fp", log=interrupt)
    with pytest.raises(ValueError, match=r"has done 1 of 2 epochs: divqat train --out .* --resume"):
        train(config(tmp_path / "fp", method="qat"), tmp_path / "qat", **QUIET)


def interrupt(line):
    raise KeyboardInterrupt


def test_changed_teacher_is_refused(tmp_path):
    fp, out = tmp_path / "fp", tmp_path / "qat"
    train(TrainConfig(**{**FP, "epochs": 1}), fp, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(config(fp, method="qat"), out, log=interrupt)
    (fp / "checkpoint.pt").unlink()
    train(TrainConfig(**{**FP, "epochs": 1, "seed": 1}), fp, **QUIET)
    with pytest.raises(ValueError, match="has changed since"):
        train(config(fp, method="qat"), out, **QUIET)


@pytest.mark.parametrize(
    ("where", "cause"),
    [("images", "input images"), ("logits", "model's logits"), ("loss", "loss became")],
)
def test_nan_stops_with_its_cause_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, where, cause
):
    calls = []
    batches, original_loss = trainer.batches, objective.F.cross_entropy

    def spoil(value, name):
        calls.append(name) if name == where else None
        # Epoch 2, step 3 of 11; one more forward pass before measures the memory.
        at = 11 + 3 + (where == "logits")
        return value * float("nan") if name == where and len(calls) == at else value

    def spoiled_batches(*args, **kwargs):
        for images, labels in batches(*args, **kwargs):
            yield spoil(images, "images"), labels

    def spoiled_loss(logits, *args, **kwargs):
        return spoil(original_loss(logits, *args, **kwargs), "loss")

    class Spoiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            y = self.model(x)
            return spoil(y, "logits") if self.training else y

    build = trainer.build_initial_model
    monkeypatch.setattr(trainer, "batches", spoiled_batches)
    monkeypatch.setattr(objective.F, "cross_entropy", spoiled_loss)
    monkeypatch.setattr(trainer, "build_initial_model", lambda *args: Spoiled(build(*args)))
    with pytest.raises(FloatingPointError, match=f"epoch 2, step 3: the {cause}"):
        train(TrainConfig(**FP), tmp_path, **QUIET)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_error_after_a_too_large_learning_rate_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 1, step .*smaller lr"):
        train(TrainConfig(**{**FP, "lr": 1e6}), tmp_path, **QUIET)


def test_missing_data_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar10"):
        train(TrainConfig(dataset="cifar10", data_root=str(tmp_path)), tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_unknown_device_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="device: wanted an available one, got 'abacus'"):
        train(TrainConfig(device="abacus"), tmp_path, **QUIET)


@pytest.mark.slow
def test_frozen_ranges_stay(teacher, tmp_path):
    ranges = {}

    def log(line):
        if line.startswith("epoch"):
            state = load_checkpoint(tmp_path / "checkpoint.pt")
            ranges[state["epoch"]] = {
                key: value
                for key, value in state["model"].items()
                if key.endswith(("running_max", "running_mean"))
            }

    train(config(teacher, method="qat", epochs=3, freeze_observers_epoch=2), tmp_path, log=log)
    for key in ranges[1]:
        same = torch.equal(ranges[1][key], ranges[2][key])
        assert same == key.endswith("running_max"), key  # BatchNorm is not frozen in epoch 2
        assert torch.equal(ranges[2][key], ranges[3][key]), key


@pytest.mark.slow
def test_seed_determines_everything(tmp_path):
    one = {**FP, "epochs": 1}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed)  # the global generator does not matter
        train(TrainConfig(**{**one, "seed": seed}), tmp_path / name, **QUIET)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert load_run(tmp_path / "a").fingerprint != load_run(tmp_path / "c").fingerprint
    assert derived_seed(0, "epoch", 1) != derived_seed(0, "epoch", 2)


def test_training_leaves_global_state_alone(tmp_path):
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    train(TrainConfig(**{**FP, "epochs": 1, "deterministic": True}), tmp_path, **QUIET)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.are_deterministic_algorithms_enabled()


def test_error_without_yaml_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"yaml is missing: pip install 'divqat\[cli\]'"):
        train(TrainConfig(**FP), tmp_path / os.urandom(4).hex(), **QUIET)
