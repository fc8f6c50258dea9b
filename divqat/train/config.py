"""The settings of one training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from divqat.quantize.config import default_weight_bits, narrow
from divqat.train import checks
from divqat.train.settings import (
    DataSettings,
    LossSettings,
    MisdirectionSettings,
    OptimizerSettings,
    QuantizationSettings,
    RunningSettings,
)
from divqat.train.settings.loss import DISTILL
from divqat.train.settings.misdirection import MISDIRECT
from divqat.train.settings.optimizer import LR_SCALING

# What a run has to share with its teacher.
SHARED = ("dataset", "data_root", "image_size", "validation_fraction", "model")
QUANTIZATION = (  # and with a reference
    "preset", "weight_bits", "activation_bits", "first_last_bits",
)  # fmt: skip
RANGES = ("ranges", "freeze_observers_epoch", "freeze_batchnorm_epoch")
LOSS = ("weight", "temperature", "direction", "classes", "bound", "guard", "warmup_epochs")
INI = ("ini_gamma", "ini_delta", "ini_epsilon")
MISDIRECTION = (
    "misdirect", "distill", "proxies", "proxy_share", "misdirect_target", "proxy_confidence",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    # the last one's fields come first
    RunningSettings,
    QuantizationSettings,
    MisdirectionSettings,
    LossSettings,
    OptimizerSettings,
    DataSettings,
):
    """What :func:`divqat.train.train` does; each field is a flag of ``divqat train`` and a key of
    its YAML files.

    Raises:
        ConfigError: a value of a wrong type or out of range, or values that contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        budgeted = self.method == "divqat" and self.accuracy_budget is not None
        self._settle("weight_bits", default_weight_bits(self.preset))
        self._settle("misdirect", MISDIRECT if budgeted else 0.0)
        self._settle("weight", 0.0 if self.misdirect else self.kind.weight)
        self._settle("direction", self.kind.direction)
        alone = self.misdirect and self.reference is not None and not self.weight
        self._settle("distill", DISTILL if alone else 0.0)
        checks.check_settings(self)
        self.check_team(1)

    def _settle(self, name: str, value: float | str) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def shows_proxies(self) -> bool:
        """Whether proxies of a thief's images go with the training images."""
        asks = self.method == "ini" and (self.ini_gamma or self.ini_epsilon)
        return bool(self.misdirect or asks)

    @property
    def idle(self) -> set[str]:
        """Settings whose values change nothing in this training."""
        idle = set[str]()
        if not self.shows_proxies:
            idle |= {*MISDIRECTION[1:], "proxy_root"}
        if not self.compares:
            idle |= {*LOSS, "cache_teacher"}
        if not self.kind.quantized:
            idle |= {*QUANTIZATION, *RANGES}
        assert self.weight_bits is not None
        if not narrow(self.weight_bits, self.activation_bits):
            idle |= {"first_last_bits"}
        if self.method != "ini":
            idle |= {*INI}
        return idle

    def check_team(self, processes: int, device: str = "cuda") -> None:
        """Whether so many processes, on devices of this type, can do the steps.

        Raises:
            ConfigError: fewer images per step than parts; exact ranges, which a layer would have
                to know of the whole batch while that is spread over several parts; so ini's
                gradients; a graph without a GPU, or of collectives; or compiled collectives.
        """
        checks.check_team(self, processes, device)

    def delayed(self, processes: int = 1) -> bool:
        """Whether activations are quantized with the range before the batch."""
        return self.ranges == "delayed" or processes * self.accumulate > 1

    def frozen(self, what: str, epoch: int) -> bool:
        """Whether ``what`` ("observers" or "batchnorm") is frozen in ``epoch``, counted from 1."""
        return epoch >= self.first_frozen(what)

    def first_frozen(self, what: str) -> float:
        """The epoch from which ``what`` is frozen, counted from 1; inf: never."""
        first = getattr(self, f"freeze_{what}_epoch")
        if first is not None:
            return first
        if self.method == "ptq":  # its passes have no other purpose
            return math.inf
        # The last third, at least the last; never in a single epoch. A second large term is more
        # than a frozen BatchNorm takes at a high learning rate.
        few = what == "batchnorm" and (self.misdirect or self.method == "kd-qat")
        return max(2, self.epochs if few else self.rewound_epoch + 1)

    @property
    def rewound_epoch(self) -> int:
        """The last epoch before the last third, after which a training may go on once more, see
        :class:`divqat.train.budget.Budget`; 0: from its begin."""
        return self.epochs - max(1, round(self.epochs / 3))

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        if self.method == "ptq":
            return 0.0
        steps = self.epochs * steps_per_epoch
        warmup = self.lr_warmup_epochs * steps_per_epoch
        # Goyal et al. 2017, §2.1 (linear); Krizhevsky 2014, §5 (square root)
        scale = (self.batch_size / self.base_batch_size) ** LR_SCALING[self.lr_scaling]
        if self.kind.quantized and self.frozen("batchnorm", 1 + step // steps_per_epoch):
            scale = min(scale, 1.0)  # what divqat.train.collapse is about
        lr = self.lr * scale
        if self.schedule == "one-cycle":
            warmup = warmup or 0.3 * steps
            if step < warmup:  # half a cosine from lr/25 to lr (Smith and Topin 2018)
                rise = (1 - math.cos(math.pi * step / warmup)) / 2
                return lr * (1 + 24 * rise) / 25
        elif step < warmup:
            return lr * (step + 1) / math.ceil(warmup)
        # lr_t = lr / 2 * (1 + cos(pi * t / T))
        return lr / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
