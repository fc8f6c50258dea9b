"""How a clone trains: the settings of every attack, and the flags that stand for them."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class StepSettings(Options):
    """The steps of SGD that every attack takes."""

    batch_size: int = option(64, "Images per step.", group="attacker", least=1)
    lr: float = option(0.02, "Highest learning rate of the clone.", group="attacker", above=0)
    momentum: float = option(0.9, "Momentum.", group="attacker", least=0, below=1)
    weight_decay: float = option(5e-4, "L2 penalty.", group="attacker", least=0)
    precision: str = option(
        "float32", "Autocast of the clone's training.", group="attacker", choices=PRECISIONS
    )


@dataclass(frozen=True, kw_only=True)
class CloneSettings(StepSettings):
    """A training on a transfer set: images, and the victim's answers to them."""

    epochs: int = option(10, "Passes over the transfer set.", group="attacker", least=1)
    pad: int = option(
        0, "Shift the images at random by up to so many pixels.", group="attacker", least=0
    )
    flip: bool = option(False, "Mirror the images at random.", group="attacker")
