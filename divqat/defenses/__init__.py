"""Post-hoc defenses: what a deployed model releases in place of its probabilities."""

from divqat.defenses.defense import Defense, Owner

__all__ = ["Defense", "Owner"]
