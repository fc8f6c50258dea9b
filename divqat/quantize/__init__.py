"""Prepare a model for quantization-aware training, convert it, summarize it."""

from divqat.quantize.config import QuantConfig, preset
from divqat.quantize.convert import convert, freeze_batchnorm, freeze_observers
from divqat.quantize.group_weights import group_weights, ungroup_weights
from divqat.quantize.mixed_precision import MixedPrecision, mixed_precision
from divqat.quantize.prepare import prepare
from divqat.quantize.ptq import ptq
from divqat.quantize.ranges import observe_first, observing, sync_observers
from divqat.quantize.save_as_codes import save_as_codes
from divqat.quantize.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from divqat.quantize.summary import Summary, summarize

__all__ = [
    "LayerSensitivity",
    "MixedPrecision",
    "QuantConfig",
    "Sensitivity",
    "Summary",
    "convert",
    "freeze_batchnorm",
    "freeze_observers",
    "group_weights",
    "mixed_precision",
    "observe_first",
    "observing",
    "prepare",
    "preset",
    "ptq",
    "save_as_codes",
    "sensitivity",
    "summarize",
    "sync_observers",
    "ungroup_weights",
]
