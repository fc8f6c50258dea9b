"""Model extraction attacks. They see a :class:`divqat.victim.Victim`, never a model."""

from divqat.attacks.attack import Attack, Extraction
from divqat.attacks.best_of import BestOf
from divqat.attacks.ddae import DDAE, DDAEPlus
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.partial_bayes import PartialBayes

#: By the name that the command line and YAML files know.
ATTACKS: dict[str, type[Attack]] = {
    "knockoff": KnockoffNets,
    "d-dae": DDAE,
    "d-dae+": DDAEPlus,
    "partial-bayes": PartialBayes,
}

__all__ = [
    "ATTACKS",
    "DDAE",
    "Attack",
    "BestOf",
    "DDAEPlus",
    "Extraction",
    "KnockoffNets",
    "PartialBayes",
]
