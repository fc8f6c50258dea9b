"""Model extraction attacks. They see a :class:`divqat.victim.Victim`, never a model."""

from divqat.attacks.attack import Attack, Extraction
from divqat.attacks.best_of import BestOf
from divqat.attacks.copycat import CopycatCNN
from divqat.attacks.ddae import DDAE, DDAEPlus
from divqat.attacks.detect_and_drop import DetectAndDrop
from divqat.attacks.dfme import DFME
from divqat.attacks.fine_tune import FineTune
from divqat.attacks.fixmatch import FixMatch
from divqat.attacks.jbda import JBDA
from divqat.attacks.jbda_tr import JBDATR
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.knockoff_adaptive import KnockoffAdaptive
from divqat.attacks.known_decoy import KnownDecoy
from divqat.attacks.labeled_only import LabeledOnly
from divqat.attacks.maze import MAZE
from divqat.attacks.partial_bayes import PartialBayes
from divqat.attacks.re_encode import ReEncode
from divqat.attacks.relabel import Relabel
from divqat.attacks.residual import Residual
from divqat.attacks.s4l import S4L
from divqat.attacks.same_shade import SameShade
from divqat.attacks.selective import Selective
from divqat.attacks.shadow import Shadow
from divqat.attacks.sift import Sift
from divqat.attacks.skeptical import SkepticalStudent
from divqat.attacks.smoothing import Smoothing

#: Attacks by their name on the command line and in YAML files.
ATTACKS: dict[str, type[Attack]] = {
    "knockoff": KnockoffNets,
    "knockoff-adaptive": KnockoffAdaptive,
    "copycat": CopycatCNN,
    "smoothing": Smoothing,
    "s4l": S4L,
    "skeptical": SkepticalStudent,
    "selective": Selective,
    "sift": Sift,
    "residual": Residual,
    "same-shade": SameShade,
    "known-decoy": KnownDecoy,
    "detect-and-drop": DetectAndDrop,
    "re-encode": ReEncode,
    "relabel": Relabel,
    "fine-tune": FineTune,
    "fixmatch": FixMatch,
    "labeled-only": LabeledOnly,
    "d-dae": DDAE,
    "d-dae+": DDAEPlus,
    "partial-bayes": PartialBayes,
    "shadow": Shadow,
    "jbda": JBDA,
    "jbda-tr": JBDATR,
    "dfme": DFME,
    "maze": MAZE,
}

__all__ = [
    "ATTACKS",
    "DDAE",
    "DFME",
    "JBDA",
    "JBDATR",
    "MAZE",
    "S4L",
    "Attack",
    "BestOf",
    "CopycatCNN",
    "DDAEPlus",
    "DetectAndDrop",
    "Extraction",
    "FineTune",
    "FixMatch",
    "KnockoffAdaptive",
    "KnockoffNets",
    "KnownDecoy",
    "LabeledOnly",
    "PartialBayes",
    "ReEncode",
    "Relabel",
    "Residual",
    "SameShade",
    "Selective",
    "Shadow",
    "Sift",
    "SkepticalStudent",
    "Smoothing",
]
