"""Settings of method and loss."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option
from divqat.ops.divergence_loss import CLASSES, DIRECTIONS
from divqat.train.methods import METHODS, Method

DISTILL = 1.0  # with misdirect and a reference


def _defaults(setting: str) -> str:
    """The default of a setting for each method."""
    values = {
        name: getattr(method, setting) for name, method in METHODS.items() if method.divergence_sign
    }
    return ", ".join(f"{value} for {name}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class LossSettings(Options):
    """Method, divergence, InI, MISLEADER and accuracy budget."""

    method: str = option(
        "fp",
        "; ".join(f"{name}: {method.help}" for name, method in METHODS.items()) + ".",
        group="what to train",
        choices=METHODS,
    )
    teacher: str | None = option(
        None,
        "Run folder of a finished full-precision training, for all methods except fp, ini and "
        "ensemble. "
        "Quantized models start from its weights; divqat, kd-qat, nasty and misleader use its "
        "answers.",
        group="what to train",
    )
    members: tuple[str, ...] | None = option(
        None, "Run folders of the finished full-precision trainings of an ensemble's networks, in "
        "their order, with method ensemble.",
        group="what to train",
    )  # fmt: skip
    label_smoothing: float = option(
        0.0, "Fraction of the target spread over all classes; with qat, a baseline defense that "
        "lowers confidence.",
        group="optimizer", least=0, below=1,
    )  # fmt: skip
    weight: float | None = option(
        None, "λ, weight of the divergence from the teacher's answers, which divqat and nasty "
        "maximize and kd-qat minimizes; with misleader its α, and the cross-entropy counts 1 - α; "
        "0: plain qat or fp. None: "
        f"{_defaults('weight')}, or 0 with misdirect.",
        group="divergence loss", least=0,
    )  # fmt: skip
    temperature: float | None = option(
        None, "T of the softmaxes in the divergence. None: "
        f"{_defaults('temperature')}.",
        group="divergence loss", above=0,
    )  # fmt: skip
    direction: str | None = option(
        None, "Divergence: KL(student‖teacher), KL(teacher‖student) or Jensen-Shannon. "
        f"None: {_defaults('direction')}.",
        group="divergence loss", choices=DIRECTIONS,
    )  # fmt: skip
    classes: str = option(
        "all", "Classes in the divergence; non_label leaves out the label's probability.",
        group="divergence loss", choices=CLASSES,
    )  # fmt: skip
    bound: float | None = option(
        None,
        "Upper limit of the divergence of an image (nats).",
        group="divergence loss",
        above=0,
    )
    guard: bool = option(
        False, "Leave misclassified images out of the divergence.", group="divergence loss"
    )
    warmup_epochs: float = option(
        0.0, "Warm-up: epochs in which λ rises from 0.", group="divergence loss", least=0
    )
    distill: float | None = option(
        None, "Weight of distillation from the reference on training images (kd-qat's loss), which "
        "lowers the accuracy cost of misdirect; excludes weight. None: "
        f"{DISTILL:g} with misdirect and a reference, else 0.",
        group="misdirection", least=0,
    )  # fmt: skip
    ini_gamma: float = option(
        0.3, "γ: pulls answers to a thief's proxies towards those of an untrained network.",
        group="InI (method ini)", least=0,
    )  # fmt: skip
    ini_delta: float = option(
        1.0, "δ: turns a thief's gradient on training images away from the task's gradient.",
        group="InI (method ini)", least=0,
    )  # fmt: skip
    ini_epsilon: float = option(
        1000.0, "ε: shrinks a thief's gradient on proxies; with γ = δ = ε = 0 the training is that "
        "of fp.",
        group="InI (method ini)", least=0,
    )  # fmt: skip
    misleader_lambda: float = option(
        0.001, "λ: turns answers to proxies away from those of a simulated thief, KL(model‖thief); "
        "0: none.",
        group="MISLEADER (method misleader)", least=0,
    )  # fmt: skip
    misleader_steps: int = option(
        5, "Steps in which the simulated thief learns the answers to a step's proxies.",
        group="MISLEADER (method misleader)", least=1,
    )  # fmt: skip
    misleader_lr: float = option(
        0.01, "Peak learning rate of the simulated thief, which follows the model's schedule.",
        group="MISLEADER (method misleader)", above=0,
    )  # fmt: skip
    accuracy_budget: float | None = option(
        None, "Points of validation accuracy that the defense may cost. The result is the last "
        "network within the budget after one of the last third of the epochs; if there is none, "
        "these are repeated with half of the defense, then a quarter; then the weights are "
        "interpolated towards the reference. None: no limit.",
        group="accuracy budget", above=0, below=100,
    )  # fmt: skip
    reference: str | None = option(
        None, "Run folder of a plain qat training with the same teacher, which the budget is "
        "measured against. None: the teacher.",
        group="accuracy budget",
    )  # fmt: skip

    @property
    def kind(self) -> Method:
        """The properties of the method."""
        return METHODS[self.method]

    @property
    def has_divergence(self) -> bool:
        """Whether the loss compares answers to training images with those of another network."""
        return bool(self.kind.divergence_sign and (self.weight or self.distill))
