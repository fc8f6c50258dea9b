"""Method and loss of a training."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option
from divqat.ops.divergence_loss import CLASSES, DIRECTIONS
from divqat.train.methods import METHODS, Method

DISTILL = 1.0  # with misdirect and a reference


def _defaults(setting: str) -> str:
    """What a setting is if it is left open, by method."""
    values = {
        name: getattr(method, setting) for name, method in METHODS.items() if method.divergence_sign
    }
    return ", ".join(f"{value} for {name}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class LossSettings(Options):
    """Method, divergence, InI and the budget of accuracy."""

    method: str = option(
        "fp",
        "; ".join(f"{name}: {method.help}" for name, method in METHODS.items()) + ".",
        group="what to train",
        choices=METHODS,
    )
    teacher: str | None = option(
        None,
        "Run folder of a finished fp, nasty or ini training, for all methods but fp and ini. "
        "Quantized models start from its weights; divqat, kd-qat and nasty learn from its answers.",
        group="what to train",
    )
    label_smoothing: float = option(
        0.0, "Share of the target spread over all classes; in qat a baseline that hides confidence "
        "without a teacher.",
        group="optimizer", least=0, below=1,
    )  # fmt: skip
    weight: float | None = option(
        None, "λ, how strongly the teacher's answers push (divqat, nasty) or pull (kd-qat); 0 is "
        f"plain qat or fp. None: {_defaults('weight')}, or 0 with misdirect.",
        group="divergence loss", least=0,
    )  # fmt: skip
    temperature: float = option(
        4.0, "T of the softmaxes whose divergence counts.", group="divergence loss", above=0
    )
    direction: str | None = option(
        None, "Divergence: KL(student‖teacher), KL(teacher‖student) or Jensen-Shannon. "
        f"None: {_defaults('direction')}.",
        group="divergence loss", choices=DIRECTIONS,
    )  # fmt: skip
    classes: str = option(
        "all", "Classes that the divergence sees; non_label leaves the label's probability alone.",
        group="divergence loss", choices=CLASSES,
    )  # fmt: skip
    bound: float | None = option(
        None,
        "Most divergence (nats) that one image is pushed to.",
        group="divergence loss",
        above=0,
    )
    guard: bool = option(
        False, "No divergence for images that are classified wrong.", group="divergence loss"
    )
    warmup_epochs: float = option(
        0.0, "Epochs in which λ rises from 0.", group="divergence loss", least=0
    )
    distill: float | None = option(
        None, "How strongly the reference's answers to training images pull (kd-qat's loss) beside "
        "misdirect, which costs less accuracy then; without weight. None: "
        f"{DISTILL:g} with misdirect and a reference, else 0.",
        group="misdirection", least=0,
    )  # fmt: skip
    ini_gamma: float = option(
        0.3, "γ: draws answers to proxies of a thief's images to those of an untrained network.",
        group="InI (method ini)", least=0,
    )  # fmt: skip
    ini_delta: float = option(
        1.0, "δ: turns what a thief learns from answers to training images away from the task.",
        group="InI (method ini)", least=0,
    )  # fmt: skip
    ini_epsilon: float = option(
        1000.0, "ε: makes what a thief learns from answers to proxies small; with γ = δ = ε = 0 "
        "the training is that of fp.",
        group="InI (method ini)", least=0,
    )  # fmt: skip
    accuracy_budget: float | None = option(
        None, "Points of validation accuracy that the defense may cost: of the last third of the "
        "epochs, the last network that is inside is the result; where none is, they are done again "
        "with half of the defense, and with a quarter; then the weights go towards those of the "
        "reference. None: any.",
        group="accuracy budget", above=0, below=100,
    )  # fmt: skip
    reference: str | None = option(
        None, "Run folder of the plain qat, of the same teacher, that the budget counts from and "
        "that the weights go back to; None: the teacher.",
        group="accuracy budget",
    )  # fmt: skip

    @property
    def kind(self) -> Method:
        """What the method is like."""
        return METHODS[self.method]

    @property
    def compares(self) -> bool:
        """Whether the loss has a divergence from another network's answers to training images."""
        return bool(self.kind.divergence_sign and (self.weight or self.distill))
