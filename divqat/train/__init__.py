"""Training: full precision, plain QAT, DivQAT, and the baselines.

Example:
    >>> from divqat.train import TrainConfig, load_run, train
    >>> train(TrainConfig(method="fp", dataset="digits", epochs=5), "runs/fp")  # doctest: +SKIP
    >>> load_run("runs/fp").model  # doctest: +SKIP
"""

from divqat.train.config import TrainConfig
from divqat.train.folder import Run, load_run
from divqat.train.run import train

__all__ = ["Run", "TrainConfig", "load_run", "train"]
