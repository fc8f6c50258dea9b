"""Checks for settings of a training that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from divqat._util.settings import ConfigError
from divqat.models import ENSEMBLE
from divqat.models.ensemble import MEMBERS
from divqat.nn.decoy import parse_key
from divqat.quantize.layer_bits import parse_layer_bits
from divqat.train.settings import LossSettings

if TYPE_CHECKING:
    from divqat.train.config import TrainConfig


def check_settings(config: TrainConfig) -> None:
    """Check settings against each other; each one by itself is valid already.

    Raises:
        ConfigError: two settings contradict each other; it names one of them.
    """
    if not config.kind.needs_teacher and config.teacher is not None:
        raise ConfigError(
            f"teacher: wanted none for method {config.method}, got {config.teacher!r}"
        )
    if config.kind.needs_teacher and config.teacher is None:
        raise ConfigError(
            "teacher: wanted the run folder of a full-precision training with method "
            f"{config.method}, got none"
        )
    if config.weights is not None and config.method != "fp":
        raise ConfigError(
            f"weights: wanted none for method {config.method}, which starts from its teacher's, "
            f"got {config.weights!r}"
        )
    if not config.epochs and config.weights is None and config.method != "ensemble":
        raise ConfigError("epochs: wanted at least 1, or weights to use unchanged, got 0")
    _check_ensemble(config)
    parse_layer_bits(config.layer_bits)
    if config.cache_teacher and (config.pad or config.flip):
        raise ConfigError(
            "cache_teacher: wanted images that are the same in every epoch, got pad = "
            f"{config.pad}, flip = {str(config.flip).lower()}"
        )
    trains_int8 = config.kind.quantized and config.method != "ptq"
    if config.save_as_codes and (config.compile or not trains_int8):
        raise ConfigError(
            "save_as_codes: wanted quantization-aware training without compile, which decides "
            f"itself what to save, got method {config.method}, compile = "
            f"{str(config.compile).lower()}"
        )
    _check_defense(config)
    if config.cuda_graph and config.optimizer != "sgd":
        raise ConfigError(
            f"cuda_graph: wanted optimizer sgd, which keeps lr on the GPU, got {config.optimizer}"
        )
    for name in ("lr_warmup_epochs", "warmup_epochs"):
        if getattr(config, name) > config.epochs:
            raise ConfigError(
                f"{name}: wanted at most epochs = {config.epochs}, got {getattr(config, name):g}"
            )


def _check_ensemble(config: TrainConfig) -> None:
    """Check method, network, epochs and members of an ensemble."""
    if config.method != "ensemble":
        if config.members is not None:
            raise ConfigError(
                f"members: wanted none with a method other than ensemble, got {config.method}"
            )
        return
    if config.model != ENSEMBLE or config.epochs:
        raise ConfigError(
            f"method: wanted model {ENSEMBLE} and epochs 0 with ensemble, got {config.model} and "
            f"{config.epochs}"
        )
    count = len(config.members or ())
    if count != len(MEMBERS):
        raise ConfigError(f"members: wanted those of {', '.join(MEMBERS)}, got {count}")


def _check_defense(config: TrainConfig) -> None:
    """Check misdirection, InI, MISLEADER, accuracy budget and reference."""
    if config.misdirect and config.method != "divqat":
        raise ConfigError(
            f"misdirect: wanted 0 with a method other than divqat, got {config.misdirect:g} with "
            f"method {config.method}"
        )
    _check_key(config)
    proxies = config.proxies or ()
    if config.uses_proxies and ("folder" in proxies) != (config.proxy_root is not None):
        raise ConfigError(
            f"proxy_root: wanted a folder if proxies include 'folder', else none, got "
            f"{config.proxy_root!r} with proxies {', '.join(proxies)}"
        )
    if config.method == "misleader" and (config.weight or 0) > 1:
        raise ConfigError(
            "weight: wanted at most 1 with misleader, where the cross-entropy counts 1 - weight, "
            f"got {config.weight:g}"
        )
    if config.method == "ini" and (config.compile or config.precision == "float16"):
        raise ConfigError(
            "method: wanted compile = false and precision float32 or bfloat16 with ini, which "
            "compares the gradients of its terms, got compile = "
            f"{str(config.compile).lower()}, precision {config.precision}"
        )
    defended = config.method == "divqat" and (config.weight or config.misdirect)
    if config.accuracy_budget is not None and not defended:
        raise ConfigError(
            "accuracy_budget: wanted method divqat with weight or misdirect above 0, got method "
            f"{config.method}, weight = {config.weight:g}, misdirect = {config.misdirect:g}"
        )
    if config.reference is not None and config.accuracy_budget is None:
        raise ConfigError(
            f"reference: wanted none without accuracy_budget, got {config.reference!r}"
        )
    if config.distill and (config.weight or not config.misdirect or config.reference is None):
        raise ConfigError(
            "distill: wanted 0 without misdirect and a reference, or with weight, got "
            f"{config.distill:g} with misdirect = {config.misdirect:g}, reference "
            f"{config.reference!r}, weight = {config.weight:g}"
        )
    if config.distill and (config.direction != "student_teacher" or config.bound is not None):
        raise ConfigError(
            "direction, bound: wanted student_teacher (the default) and no bound with distill, "
            "whose loss is an unbounded KL(reference‖student), got "
            f"{config.direction} and {config.bound}"
        )


def _check_key(config: TrainConfig) -> None:
    if config.decoy_key is None:
        return
    if config.misdirect and config.misdirect_target != "decoy":
        raise ConfigError(
            f"decoy_key: wanted none with misdirect_target {config.misdirect_target}, got one"
        )
    try:
        parse_key(config.decoy_key)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_divergence(settings: LossSettings, num_classes: int) -> None:
    """Check that the divergence can differ from 0.

    Raises:
        ConfigError: it cannot.
    """
    if (settings.method, settings.classes, num_classes) == ("divqat", "non_label", 2):
        raise ConfigError(
            "classes: wanted all with two classes, got non_label: the only other class always has "
            "probability 1, so the divergence would be 0"
        )


def check_world_size(config: TrainConfig, processes: int, device: str) -> None:
    """See :meth:`TrainConfig.check_world_size`."""
    parts = processes * config.accumulate
    if config.batch_size < parts:
        raise ConfigError(
            f"batch_size: wanted at least one image for each of {processes} processes times "
            f"accumulate = {config.accumulate}, got {config.batch_size}"
        )
    if config.ranges == "exact" and parts > 1:
        raise ConfigError(
            f"ranges: wanted delayed or auto with {processes} processes and accumulate = "
            f"{config.accumulate}, got exact"
        )
    whole = {"ini": "whose loss is no sum over images", "misleader": "whose thief learns each step"}
    if config.method in whole and parts > 1:
        raise ConfigError(
            f"method: wanted one process and accumulate = 1 with {config.method}, "
            f"{whole[config.method]}, got {processes} and {config.accumulate}"
        )
    if config.cuda_graph and (device != "cuda" or processes > 1):
        raise ConfigError(
            f"cuda_graph: wanted one process on a GPU, got {processes} on device {device}"
        )
    if config.sync_batchnorm and config.compile and processes > 1:
        raise ConfigError(
            f"sync_batchnorm: wanted compile = false with {processes} processes, got true"
        )
