"""What a run folder survives, and with which settings it can be resumed."""

import csv
import errno
import os
from dataclasses import replace

import pytest
from networks import quantized
from test_train import FP, QUIET, assert_same

from divqat._util import files
from divqat._util.files import load_checkpoint, save_checkpoint
from divqat.train import TrainConfig, folder, train
from divqat.train.network import build_model


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_kill_between_checkpoint_and_metrics_loses_no_row(tmp_path, monkeypatch, epochs):
    settings = TrainConfig(**{**FP, "epochs": epochs})
    write = folder.write_text

    def killed(path, text):
        if load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == epochs:
            raise KeyboardInterrupt
        return write(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder, "write_text", killed)
        train(settings, tmp_path, **QUIET)
    train(settings, tmp_path, **QUIET)
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == list("12"[:epochs])
    assert (tmp_path / "plots" / "training.png").is_file()


@pytest.mark.slow
def test_a_training_resumes_after_a_full_disk(tmp_path, monkeypatch):
    settings, fsync = TrainConfig(**FP), files.os.fsync
    path = tmp_path / "run" / "checkpoint.pt"

    def full(file):
        if path.is_file() and load_checkpoint(path)["epoch"] == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    train(settings, tmp_path / "whole", **QUIET)
    with monkeypatch.context() as patch, pytest.raises(files.WriteError) as caught:
        patch.setattr(files.os, "fsync", full)
        train(settings, tmp_path / "run", **QUIET)
    assert "metrics.csv: No space left on device; " in str(caught.value)
    assert "repeat the command to resume" in str(caught.value)
    train(settings, tmp_path / "run", **QUIET)
    assert_same(tmp_path / "run", tmp_path / "whole")


LOSS = dict(
    weight=5.0, temperature=9.0, direction="js", classes="non_label", bound=0.1, guard=True,
    warmup_epochs=1.0, cache_teacher=True,
)  # fmt: skip
INT8 = dict(
    preset="tensorrt", weight_bits=4, activation_bits=4, ranges="delayed",
    freeze_observers_epoch=2, freeze_batchnorm_epoch=1,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "unused"), [("fp", {**LOSS, **INT8}), ("qat", LOSS)])
def test_unused_settings_change_no_bit_and_may_differ(lenet_teacher, tmp_path, method, unused):
    teacher = None if method == "fp" else str(lenet_teacher)
    own = {**FP, "pad": 0, "method": method, "teacher": teacher}
    plain, other = TrainConfig(**own), TrainConfig(**own, **unused)
    assert {*unused} == {*LOSS, *INT8} & plain.unused
    train(plain, tmp_path / "a", **QUIET)
    train(other, tmp_path / "b", **QUIET)
    assert_same(tmp_path / "a", tmp_path / "b")
    lines = []
    train(other, tmp_path / "a", log=lines.append)
    assert "all 2 epochs are done" in lines[0]


def test_settings_that_one_of_two_trainings_uses_may_not_differ(tmp_path):
    there, here = (TrainConfig(method="divqat", teacher="a", weight=w) for w in (0.1, 0.0))
    assert not {*LOSS, *INT8} & there.unused and {*LOSS} <= here.unused
    with pytest.raises(ValueError, match=r"weight: 0\.1 -> 0\.0"):
        folder.check_same_settings(tmp_path, there.to_dict(), here)


def test_without_validation_images_no_training_starts(tmp_path):
    settings = TrainConfig(**{**FP, "validation_fraction": 0.003})
    with pytest.raises(ValueError, match=r"validation_fraction: wanted one .* got 0\.003, which"):
        train(settings, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_an_old_checkpoint_gets_the_former_behavior_for_new_settings(tmp_path):
    """The first and last layers of few-bit networks had 8 bits, and there was no distillation."""
    config = TrainConfig(method="qat", teacher="a", dataset="digits", model="lenet", weight_bits=4)
    before = {k: v for k, v in config.to_dict().items() if k not in ("first_last_bits", "distill")}
    parts = {"epoch": 1, "model": {}, "optimizer": {}, "rows": [], "teacher": None}
    shape = {"in_channels": 1, "num_classes": 10, "image_size": [8, 8]}
    save_checkpoint(tmp_path / "checkpoint.pt", {"config": before, "shape": shape, **parts})
    there = TrainConfig.from_dict(folder.read_checkpoint(tmp_path)["config"])
    assert (there.weight_bits, there.first_last_bits, there.distill) == (4, 8, 0.0)
    widths = [layer.weight_spec.bits for layer in quantized(build_model(there, shape)).values()]
    assert widths == [8, 4, 4, 4, 8]
    now = [layer.weight_spec.bits for layer in quantized(build_model(config, shape)).values()]
    assert now == [7, 4, 4, 4, 7]
    with pytest.raises(ValueError, match="first_last_bits: 8 -> 7"):
        folder.check_same_settings(tmp_path, there.to_dict(), config)
    wide = [replace(each, weight_bits=8) for each in (there, config)]
    # with 8 bits, first_last_bits has no effect
    folder.check_same_settings(tmp_path, wide[0].to_dict(), wide[1])
