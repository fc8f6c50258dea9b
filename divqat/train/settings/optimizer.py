"""How a training takes its steps."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option

OPTIMIZERS = ("sgd", "lars", "lamb")
# Exponent of batch_size / base_batch_size in the learning rate.
LR_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Options):
    """Epochs, batches, learning rate."""

    epochs: int = option(
        10, "Passes over the training images; ptq needs no more than 1.", group="optimizer", least=0
    )
    batch_size: int = option(
        64, "Images per step, of all processes together.", group="optimizer", least=1
    )
    accumulate: int = option(
        1, "Parts that a process splits its images of a step into, to need less memory; same "
        "gradient, BatchNorm and dropout aside.",
        group="optimizer", least=1,
    )  # fmt: skip
    optimizer: str = option(
        "sgd",
        "sgd: Nesterov; lars and lamb scale each layer's step by the ratio of its norms, for large "
        "batches.",
        group="optimizer",
        choices=OPTIMIZERS,
    )
    lr: float = option(0.05, "Highest learning rate.", group="optimizer", above=0)
    lr_scaling: str = option(
        "none",
        "What lr is multiplied by: 1, or the ratio batch_size / base_batch_size (linear, for sgd), "
        "or its square root (for lars and lamb); at most 1 from the freezing of BatchNorm on.",
        group="optimizer",
        choices=tuple(LR_SCALING),
    )
    base_batch_size: int = option(
        128, "Images per step that lr holds for, where it is scaled.", group="optimizer", least=1
    )
    schedule: str = option(
        "cosine",
        "Course of the learning rate: cosine falls from lr to 0; "
        "one-cycle rises from lr/25 to lr, then falls to 0.",
        group="optimizer",
        choices=("cosine", "one-cycle"),
    )
    lr_warmup_epochs: float = option(
        0.0,
        "Epochs in which the learning rate rises; 0: none for cosine, 30 % of all for one-cycle.",
        group="optimizer",
        least=0,
    )
    momentum: float = option(
        0.9, "Momentum of sgd (Nesterov) and lars.", group="optimizer", least=0, below=1
    )
    weight_decay: float = option(5e-4, "L2 penalty.", group="optimizer", least=0)
    grad_clip: float | None = option(
        None, "Largest norm of a step's gradient; longer ones are scaled down.",
        group="optimizer", above=0,
    )  # fmt: skip
