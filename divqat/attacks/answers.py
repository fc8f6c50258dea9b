"""Targets for the clone, made from the victim's answers without further queries."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from divqat._util.settings import ConfigError
from divqat.victim.answers import distributions, keep_top, label_only

READINGS = "as_given, label, temperature<T>, standardized<s>, top<k>, rounded<decimals> or shuffled"
LEAST = 1e-12  # a probability that is 0 counts as this in a logarithm


def reading(text: str) -> Callable[[Tensor], Tensor]:
    """A function from answers [N, num_classes] to the targets [N, num_classes] of a clone.

    ``as_given``: scaled to sum 1. ``label``: the class with the largest entry, one-hot.
    ``temperature<T>``: y^(1/T), which softens for T above 1 and sharpens below.
    ``standardized<s>``: softmax of s (log y - m) / d, with mean m and standard deviation d of each
    class over all answers. It amplifies what distinguishes an image from the others, however small,
    and removes what all answers have in common. Ours; against victims that give similar answers to
    all foreign images. ``top<k>``: the k largest entries. ``rounded<d>``: to d decimals.
    ``shuffled``: answers to other images, a control that has to end at chance.

    Raises:
        ConfigError: ``text`` is none of these.
    """
    if text == "as_given":
        return distributions
    if text == "label":
        return label_only
    if text == "shuffled":
        return _shuffled
    match = re.fullmatch(r"(temperature|standardized|top|rounded)(\d+(?:\.\d+)?)", text)
    number = float(match[2]) if match else 0.0
    if match is None or (number <= 0 and match[1] != "rounded"):
        raise ConfigError(f"reading: wanted {READINGS}, got {text!r}")
    if match[1] == "temperature":
        # Logarithms: with a small T all powers of a row could underflow to 0.
        return lambda answers: (distributions(answers).log() / number).softmax(1)
    if match[1] == "standardized":
        return lambda answers: _standardized(answers, number)
    if number % 1:
        raise ConfigError(f"reading: wanted a whole number after {match[1]}, got {text!r}")
    if match[1] == "top":
        return lambda answers: distributions(keep_top(answers, int(number)))
    return lambda answers: distributions(answers.round(decimals=int(number)))


def lowest(scores: Tensor, share: float) -> Tensor:  # [N] -> int64 [M], ascending
    """The rows of the ``share`` with the lowest scores, rounded, but at least one.

    Of equal rows the earlier ones come first."""
    count = max(1, round(share * len(scores)))
    return scores.sort(stable=True).indices[:count].sort().values


def centred_logs(answers: Tensor) -> Tensor:  # [N, num_classes] -> like answers
    """c(log y), c(v) = v - mean(v): logits, up to a constant of each row."""
    logs = distributions(answers).clamp(min=LEAST).log()
    return logs - logs.mean(1, keepdim=True)


def _standardized(answers: Tensor, scale: float) -> Tensor:
    logs = distributions(answers).clamp(min=LEAST).log()
    # unbiased=False: the deviation of a single answer is 0, not NaN.
    spread = logs.std(0, unbiased=False).clamp(min=1e-6)
    return (scale * (logs - logs.mean(0)) / spread).softmax(1)


def _shuffled(answers: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return distributions(answers[torch.randperm(len(answers), generator=generator)])
