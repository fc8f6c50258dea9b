"""The settings of a training by topic. Each is declared once: a flag, a YAML key, an attribute.

A function takes the topic that it uses; :class:`divqat.train.TrainConfig` is all of them.
"""

from divqat.train.settings.data import DataSettings
from divqat.train.settings.loss import LossSettings
from divqat.train.settings.misdirection import MisdirectionSettings
from divqat.train.settings.optimizer import OptimizerSettings
from divqat.train.settings.quantization import QuantizationSettings
from divqat.train.settings.running import RunningSettings

__all__ = [
    "DataSettings",
    "LossSettings",
    "MisdirectionSettings",
    "OptimizerSettings",
    "QuantizationSettings",
    "RunningSettings",
]
