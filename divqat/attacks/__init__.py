"""Model extraction attacks. They see a :class:`divqat.victim.Victim`, never a model."""

from divqat.attacks.attack import Attack, Extraction
from divqat.attacks.knockoff import KnockoffNets

__all__ = ["Attack", "Extraction", "KnockoffNets"]
