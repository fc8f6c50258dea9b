"""Post-hoc defenses: a deployed model releases perturbed answers instead of its probabilities."""

from divqat.defenses.adaptive_misinformation import AdaptiveMisinformation
from divqat.defenses.calibrate import calibrated, l1_distance
from divqat.defenses.dcp import DCP
from divqat.defenses.defense import Defense, Owner
from divqat.defenses.grad2 import GRAD2
from divqat.defenses.keep import LabelOnly, Rounding, TopK
from divqat.defenses.mad import MAD
from divqat.defenses.modelguard import ModelGuardS, ModelGuardW
from divqat.defenses.random_noise import RandomNoise
from divqat.defenses.reverse_sigmoid import ClampedReverseSigmoid, ReverseSigmoid
from divqat.defenses.stingy import Stingy
from divqat.defenses.temperature import Temperature

#: Defenses by their name on the command line and in YAML files.
DEFENSES: dict[str, type[Defense]] = {
    "label": LabelOnly,
    "top": TopK,
    "rounding": Rounding,
    "temperature": Temperature,
    "stingy": Stingy,
    "random": RandomNoise,
    "reverse-sigmoid": ReverseSigmoid,
    "clamped-reverse-sigmoid": ClampedReverseSigmoid,
    "dcp": DCP,
    "adaptive-misinformation": AdaptiveMisinformation,
    "mad": MAD,
    "grad2": GRAD2,
    "modelguard-w": ModelGuardW,
    "modelguard-s": ModelGuardS,
}

__all__ = [
    "DCP",
    "DEFENSES",
    "GRAD2",
    "MAD",
    "AdaptiveMisinformation",
    "ClampedReverseSigmoid",
    "Defense",
    "LabelOnly",
    "ModelGuardS",
    "ModelGuardW",
    "Owner",
    "RandomNoise",
    "ReverseSigmoid",
    "Rounding",
    "Stingy",
    "Temperature",
    "TopK",
    "calibrated",
    "l1_distance",
]
