"""Model extraction attacks. They see a :class:`divqat.victim.Victim`, never a model."""

from divqat.attacks.knockoff import Extraction, KnockoffNets

__all__ = ["Extraction", "KnockoffNets"]
