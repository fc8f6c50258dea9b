"""The settings of a training, by topic. A setting is declared once, which gives a flag, a YAML key
and an attribute.

A function takes the topic that it uses; :class:`divqat.train.TrainConfig` combines all topics.
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
