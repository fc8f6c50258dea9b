"""Whether a model was copied from a model that ``divqat`` defended with a decoy.

The decoy that misleads a thief is a mark that he takes home: a clone of the defended model has
learned it. The last layer W of the decoy is drawn from a key. So whoever knows the key can ask a
suspect model a few hundred images, and compare how often it agrees with this decoy, and how often
with those of ten thousand other keys. ``docs/ownership.md`` has the protocol, and its limits.
"""

from divqat.ownership.check import Verdict, check
from divqat.ownership.commitment import ClaimRefused, commit, derive_key, verify_claim
from divqat.ownership.page import write_verdict

__all__ = [
    "ClaimRefused",
    "Verdict",
    "check",
    "commit",
    "derive_key",
    "verify_claim",
    "write_verdict",
]
