"""Short trainings of a network with BatchNorm, for tests of speed options."""

import pytest
from test_train import DIVQAT, QUIET, config
from torch import nn

from divqat._util.files import load_checkpoint
from divqat.train import TrainConfig, train

PLAIN = {**DIVQAT, "pad": 0, "epochs": 3, "model": "vgg_small"}
TINY = "trainings:tiny"  # a value for ``model`` of TrainConfig


def tiny(*, in_channels, num_classes, image_size):
    """A cheap network with every kind of layer that a training treats specially."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes),
    )  # fmt: skip


def teach(folder, model="vgg_small"):
    """Train in full precision; returns ``folder``."""
    settings = dict(dataset="digits", model=model, batch_size=64, epochs=3, threads=1)
    train(TrainConfig(**settings), folder, **QUIET)
    return folder


def train_until(config, folder, epoch):
    """Train and interrupt after ``epoch``."""

    def log(line):
        if line.startswith(f"epoch {epoch}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, folder, log=log)


def train_interrupted(config, folder, epoch):
    """Train, interrupt after ``epoch``, and resume to the end."""
    train_until(config, folder, epoch)
    train(config, folder, **QUIET)


def trained(teacher, folder, **changes):
    """The checkpoint of a DivQAT training with six steps per epoch, the last one of 14 images."""
    train(config(teacher, **{**PLAIN, **changes}), folder, **QUIET)
    return load_checkpoint(folder / "checkpoint.pt")
