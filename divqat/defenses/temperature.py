"""Output temperature, the simplest change of confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from divqat._util.settings import option
from divqat.defenses.defense import Defense


@dataclass(frozen=True, kw_only=True)
class Temperature(Defense):
    """softmax(z / T) of the victim's logits z: softer answers for T above 1, sharper ones below.

    (Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section
    4.2, who fit T to calibrate.) It is the control for the effect of a change of confidence alone:
    an attacker who knows T can invert it. A class whose float32 probability is 0 keeps 0. The order
    of the classes stays, but with a large T probabilities may become equal in float32.
    """

    keeps_top1: ClassVar[bool] = True
    strength: ClassVar[str | None] = "temperature"
    neutral: ClassVar[float] = 1.0

    temperature: float = option(2.0, "T; 1 changes nothing.", above=0)

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        # y' = softmax(log(y) / T), the same as softmax(z / T): log y is z minus a constant
        return (probs.log() / self.temperature).softmax(1)
