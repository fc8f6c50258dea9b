"""Model extraction attacks. They see a :class:`divqat.victim.Victim`, never a model."""

from divqat.attacks.attack import Attack, Extraction
from divqat.attacks.knockoff import KnockoffNets

#: By the name that the command line and YAML files know.
ATTACKS: dict[str, type[Attack]] = {"knockoff": KnockoffNets}

__all__ = ["ATTACKS", "Attack", "Extraction", "KnockoffNets"]
