"""Settings of optimizer and learning rate."""

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
        10, "Passes over the training images; ptq needs only 1.", group="optimizer", least=0
    )
    batch_size: int = option(64, "Images per step, over all processes.", group="optimizer", least=1)
    accumulate: int = option(
        1, "Gradient accumulation: micro-batches per step and process, to save memory; same "
        "gradient, except for BatchNorm and dropout.",
        group="optimizer", least=1,
    )  # fmt: skip
    optimizer: str = option(
        "sgd",
        "sgd: Nesterov momentum; lars, lamb: for large batches, scale each layer's step by the "
        "norm of its weights over that of its update.",
        group="optimizer",
        choices=OPTIMIZERS,
    )
    lr: float = option(0.05, "Peak learning rate.", group="optimizer", above=0)
    lr_scaling: str = option(
        "none",
        "Factor of lr: none: 1; linear (for sgd): batch_size / base_batch_size; sqrt (for lars and "
        "lamb): its square root. At most 1 once BatchNorm is frozen.",
        group="optimizer",
        choices=tuple(LR_SCALING),
    )
    base_batch_size: int = option(
        128, "Batch size for which lr is meant, if lr is scaled.", group="optimizer", least=1
    )
    schedule: str = option(
        "one-cycle",
        "Learning-rate schedule: one-cycle rises from lr/25 to lr, then falls to 0; cosine falls "
        "from lr to 0.",
        group="optimizer",
        choices=("one-cycle", "cosine"),
    )
    lr_warmup_epochs: float = option(
        0.0,
        "Warm-up epochs of the learning rate; 0: 30 % of all for one-cycle, none for cosine.",
        group="optimizer",
        least=0,
    )
    momentum: float = option(
        0.9, "Momentum of sgd (Nesterov) and lars.", group="optimizer", least=0, below=1
    )
    weight_decay: float = option(5e-4, "L2 penalty.", group="optimizer", least=0)
    grad_clip: float | None = option(
        None, "Gradient clipping: largest norm of a step's gradient.",
        group="optimizer", above=0,
    )  # fmt: skip
