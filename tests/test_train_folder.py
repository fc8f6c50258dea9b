"""What a run folder survives and which settings it goes on with."""

import csv

import pytest
from test_train import FP, QUIET

from divqat.files import load_checkpoint
from divqat.train import TrainConfig, folder, train


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_kill_between_checkpoint_and_metrics_costs_no_row(tmp_path, monkeypatch, epochs):
    config = TrainConfig(**{**FP, "epochs": epochs})
    write = folder.write_text

    def killed(path, text):
        if load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == epochs:
            raise KeyboardInterrupt
        return write(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder, "write_text", killed)
        train(config, tmp_path, **QUIET)
    (tmp_path / ".checkpoint-abc.pt").write_bytes(b"half a checkpoint")
    train(config, tmp_path, **QUIET)
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == list("12"[:epochs])
    assert (tmp_path / "plots" / "training.png").is_file()
    assert not list(tmp_path.glob(".checkpoint*"))


def test_without_validation_images_nothing_is_begun(tmp_path):
    config = TrainConfig(**{**FP, "validation_fraction": 0.003})
    with pytest.raises(ValueError, match=r"validation_fraction: wanted one .* got 0\.003, of"):
        train(config, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()
