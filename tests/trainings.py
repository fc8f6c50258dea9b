"""Short trainings of a network with BatchNorm, for the tests of what makes a training fast."""

import pytest
from test_train import DIVQAT, QUIET, config

from divqat.files import load_checkpoint
from divqat.train import TrainConfig, train

PLAIN = {**DIVQAT, "pad": 0, "epochs": 3, "model": "vgg_small"}


def teach(folder, model="vgg_small"):
    """A full-precision training."""
    settings = dict(dataset="digits", model=model, batch_size=64, epochs=3, threads=1)
    train(TrainConfig(**settings), folder, **QUIET)
    return folder


def train_until(config, folder, epoch):
    """Train, interrupted after ``epoch``."""

    def log(line):
        if line.startswith(f"epoch {epoch}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, folder, log=log)


def train_interrupted(config, folder, epoch):
    """Train, interrupted after ``epoch``, and go on to the end."""
    train_until(config, folder, epoch)
    train(config, folder, **QUIET)


def trained(teacher, folder, **changes):
    """The checkpoint of a DivQAT training of six steps per epoch, the last of 14 images."""
    train(config(teacher, **{**PLAIN, **changes}), folder, **QUIET)
    return load_checkpoint(folder / "checkpoint.pt")
