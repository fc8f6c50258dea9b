"""Post-hoc defenses: what a deployed model releases in place of its probabilities."""

from divqat.defenses.calibrate import calibrated, l1_distance
from divqat.defenses.defense import Defense, Owner

#: By the name that the command line and YAML files know.
DEFENSES: dict[str, type[Defense]] = {}

__all__ = ["DEFENSES", "Defense", "Owner", "calibrated", "l1_distance"]
