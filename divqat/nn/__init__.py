"""Drop-in modules: observers, fake-quantizers, quantized layers, the losses of DivQAT."""

from divqat.nn.accuracy_budget import AccuracyBudget
from divqat.nn.conv import QuantConv2d, QuantConvTranspose2d
from divqat.nn.conv_bn import QuantConvBn2d
from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.nn.function import QuantFunction
from divqat.nn.linear import QuantLinear
from divqat.nn.loss import DivQATLoss
from divqat.nn.misdirection import MisdirectionLoss
from divqat.nn.observer import MovingAverageMinMaxObserver
from divqat.nn.output import RectifiedOutput
from divqat.nn.spec import QuantSpec

__all__ = [
    "AccuracyBudget",
    "DivQATLoss",
    "FakeQuantize",
    "LearnedStepFakeQuantize",
    "MisdirectionLoss",
    "MovingAverageMinMaxObserver",
    "QuantConv2d",
    "QuantConvBn2d",
    "QuantConvTranspose2d",
    "QuantFunction",
    "QuantLinear",
    "QuantSpec",
    "RectifiedOutput",
]
