"""The settings of one training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from divqat.data.proxies import PROXIES
from divqat.nn.budget_search import last_third
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

# Settings that a run must share with its teacher ...
SHARED = ("dataset", "data_root", "image_size", "validation_fraction", "model")
QUANTIZATION = (  # ... and those that it must also share with a reference
    "preset", "weight_bits", "activation_bits", "first_last_bits", "layer_bits",
)  # fmt: skip
POST_TRAINING = {  # of method ptq, with the values that leave it at observing
    "activation_ranges": "average", "weight_ranges": "minmax", "equalize": False,
    "rounding": "nearest", "bias_correction": False,
}  # fmt: skip
RANGES = ("ranges", "freeze_observers_epoch", "freeze_batchnorm_epoch")
LOSS = ("weight", "temperature", "direction", "classes", "bound", "guard", "warmup_epochs")
MISLEADER = ("misleader_lambda", "misleader_steps", "misleader_lr")
INI = ("ini_gamma", "ini_delta", "ini_epsilon")
MISDIRECTION = (
    "misdirect", "distill", "proxies", "proxy_share", "misdirect_target", "proxy_confidence",
    "decoy_key",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    # The fields of the last base class come first.
    RunningSettings,
    QuantizationSettings,
    MisdirectionSettings,
    LossSettings,
    OptimizerSettings,
    DataSettings,
):
    """The settings of :func:`divqat.train.train`. Each field is a flag of ``divqat train`` and a
    key of its YAML files.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or two contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        budgeted = self.method == "divqat" and self.accuracy_budget is not None
        self._set_default("weight_bits", default_weight_bits(self.preset))
        self._set_default("misdirect", MISDIRECT if budgeted else 0.0)
        self._set_default("weight", 0.0 if self.misdirect else self.kind.weight)
        self._set_default("temperature", self.kind.temperature)
        self._set_default("direction", self.kind.direction)
        self._set_default("proxies", ("augmented",) if self.method == "misleader" else PROXIES)
        distills = self.misdirect and self.reference is not None and not self.weight
        self._set_default("distill", DISTILL if distills else 0.0)
        checks.check_settings(self)
        self.check_world_size(1)

    def _set_default(self, name: str, value: float | str | tuple[str, ...]) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def uses_proxies(self) -> bool:
        """Whether each batch also holds proxies of a thief's images."""
        ini = self.method == "ini" and (self.ini_gamma or self.ini_epsilon)
        misleader = self.method == "misleader" and self.misleader_lambda
        return bool(self.misdirect or ini or misleader)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the settings that must be those of the teacher and of members. A misleader model
        may have another network, as it only learns from the teacher's answers."""
        differs = {"model"} if self.method in ("misleader", "ensemble") else {}
        return tuple(name for name in SHARED if name not in differs)

    @property
    def rejects(self) -> bool:
        """Whether the deployed network answers foreign images with zeros."""
        return bool(self.misdirect and self.misdirect_target == "reject" and self.kind.quantized)

    @property
    def calibrates(self) -> bool:
        """Whether post-training quantization does more than observe the training images."""
        changed = any(getattr(self, name) != value for name, value in POST_TRAINING.items())
        return self.method == "ptq" and changed

    @property
    def unused(self) -> set[str]:
        """Names of the settings that have no effect on this training."""
        unused = set[str]()
        if not self.uses_proxies:
            unused |= {*MISDIRECTION[1:], "proxy_root"}
        if not self.has_divergence:
            unused |= {*LOSS, "cache_teacher"}
        if not self.kind.quantized:
            unused |= {*QUANTIZATION, *RANGES}
        assert self.weight_bits is not None
        if not narrow(self.weight_bits, self.activation_bits):
            unused |= {"first_last_bits"}
        if self.method != "ptq":
            unused |= {*POST_TRAINING}
        if self.method != "ptq" or self.activation_ranges != "percentile":
            unused |= {"percentile"}
        if self.method != "ptq" or self.rounding != "learned":
            unused |= {"rounding_steps"}
        if not self.calibrates:
            unused |= {"calibration_images"}
        if self.method != "ini":
            unused |= {*INI}
        if self.method != "misleader":
            unused |= {*MISLEADER}
        return unused

    def check_world_size(self, processes: int, device: str = "cuda") -> None:
        """Check that ``processes`` processes on devices of this type can train with these settings.

        Raises:
            ConfigError: fewer images per step than micro-batches; exact ranges, or method ini or
                misleader, with several micro-batches, as they need the whole batch at once; a CUDA
                graph without a GPU or with several processes; or compiled synchronized BatchNorm.
        """
        checks.check_world_size(self, processes, device)

    def uses_delayed_ranges(self, processes: int = 1) -> bool:
        """Whether a batch is quantized with the ranges observed before it."""
        return self.ranges == "delayed" or processes * self.accumulate > 1

    def is_frozen(self, what: str, epoch: int) -> bool:
        """Whether ``what`` ("observers" or "batchnorm") is frozen in ``epoch``, counted from 1."""
        return epoch >= self.freeze_epoch(what)

    def freeze_epoch(self, what: str) -> float:
        """The first epoch, counted from 1, in which ``what`` is frozen; inf if it never is."""
        first = getattr(self, f"freeze_{what}_epoch")
        if first is not None:
            return first
        if self.method == "ptq":  # observing is all that it does
            return math.inf
        if what == "batchnorm" and self.rejects:
            # Frozen, it diverged within an epoch at a learning rate of 0.005, as the loss has no
            # bound on foreign images.
            return math.inf
        # The last third, but at least the last epoch; never in a single epoch. BatchNorm freezes
        # late where the loss has a second large term: at a high learning rate it would diverge.
        late = what == "batchnorm" and (self.misdirect or self.method == "kd-qat")
        return max(2, self.epochs if late else self.rewind_epoch + 1)

    @property
    def rewind_epoch(self) -> int:
        """The epoch after which the last third begins, to which :class:`divqat.train.budget.Budget`
        can rewind; 0 is the start of the training."""
        return last_third(self.epochs)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of ``step``, counted from 0 over the whole run."""
        if self.method == "ptq":
            return 0.0
        steps = self.epochs * steps_per_epoch
        warmup = self.lr_warmup_epochs * steps_per_epoch
        # Goyal et al. 2017, §2.1 (linear); Krizhevsky 2014, §5 (square root)
        scale = (self.batch_size / self.base_batch_size) ** LR_SCALING[self.lr_scaling]
        if self.kind.quantized and self.is_frozen("batchnorm", 1 + step // steps_per_epoch):
            scale = min(scale, 1.0)  # see divqat.train.collapse
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
