"""What a training learns, from which images, and with which loss: the first half of
:class:`divqat.train.TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from divqat import data, models
from divqat.data.pictures import STREAM
from divqat.data.proxies import NAMES, PROXIES
from divqat.ops.divergence_loss import CLASSES, DIRECTIONS
from divqat.options import Options, option
from divqat.train.methods import METHODS

OPTIMIZERS = ("sgd", "lars", "lamb")
# Exponent of batch_size / base_batch_size in the learning rate.
LR_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
MISDIRECT, DISTILL = 0.8, 1.0  # with an accuracy budget; beside that, with a reference
TARGETS = ("decoy", "permuted", "per_image", "least_likely", "second", "divergence")


def _defaults(setting: str) -> str:
    """What a setting is if it is left open, by method."""
    values = {name: getattr(method, setting) for name, method in METHODS.items() if method.sign}
    return ", ".join(f"{value} for {name}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Learning(Options):
    """Settings of the data, the optimizer and the loss."""

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
    model: str = option(
        "lenet", "Network; one of yours: a function of in_channels, num_classes and image_size.",
        group="what to train", choices=models.names(), foreign=True,
    )  # fmt: skip
    weights: str | None = option(
        None, "State dict (.pt) of the network, trained elsewhere, that fp begins with; with "
        "epochs 0 it is taken as it is.",
        group="what to train",
    )  # fmt: skip

    dataset: str = option("digits", "Data set to learn.", group="data", choices=data.names())
    data_root: str | None = option(
        None, "Folder with the data set's files, where they are not found by themselves.",
        group="data",
    )  # fmt: skip
    image_size: int = option(
        32, "Height and width for gtsrb and folder, whose pictures vary in size.",
        group="data", least=8, most=2048,
    )  # fmt: skip
    validation_fraction: float = option(
        0.1, "Part of the training images kept aside to validate on.",
        group="data", above=0, below=1,
    )  # fmt: skip
    stream: str = option(
        "auto",
        "Decode the pictures of gtsrb and folder while training instead of holding them all; auto: "
        "if they would take more than 4 GiB. The batches are the same.",
        group="data",
        choices=STREAM,
    )
    workers: int | None = option(
        None, "Processes that decode streamed pictures; None: one per core but one, shared by the "
        "processes of torchrun; 0: the training does it itself.",
        group="data", least=0,
    )  # fmt: skip
    pad: int = option(
        0, "Shift each training image at random by up to so many pixels.", group="data", least=0
    )
    flip: bool = option(False, "Mirror training images at random.", group="data")

    epochs: int = option(
        10, "Passes over the training images; ptq needs no more than 1.", group="optimizer", least=0
    )
    batch_size: int = option(
        64, "Images per step, of all processes together.", group="optimizer", least=1
    )
    accumulate: int = option(
        1, "Parts that a process splits its images of a step into, to need less memory; same "
        "gradient, BatchNorm and dropout aside.",
        group="optimizer", least=1,
    )  # fmt: skip
    optimizer: str = option(
        "sgd",
        "sgd: Nesterov; lars and lamb scale each layer's step by the ratio of its norms, for large "
        "batches.",
        group="optimizer",
        choices=OPTIMIZERS,
    )
    lr: float = option(0.05, "Highest learning rate.", group="optimizer", above=0)
    lr_scaling: str = option(
        "none",
        "What lr is multiplied by: 1, or the ratio batch_size / base_batch_size (linear, for sgd), "
        "or its square root (for lars and lamb); at most 1 from the freezing of BatchNorm on.",
        group="optimizer",
        choices=tuple(LR_SCALING),
    )
    base_batch_size: int = option(
        128, "Images per step that lr holds for, where it is scaled.", group="optimizer", least=1
    )
    schedule: str = option(
        "cosine",
        "Course of the learning rate: cosine falls from lr to 0; "
        "one-cycle rises from lr/25 to lr, then falls to 0.",
        group="optimizer",
        choices=("cosine", "one-cycle"),
    )
    lr_warmup_epochs: float = option(
        0.0,
        "Epochs in which the learning rate rises; 0: none for cosine, 30 % of all for one-cycle.",
        group="optimizer",
        least=0,
    )
    momentum: float = option(
        0.9, "Momentum of sgd (Nesterov) and lars.", group="optimizer", least=0, below=1
    )
    weight_decay: float = option(5e-4, "L2 penalty.", group="optimizer", least=0)
    grad_clip: float | None = option(
        None, "Largest norm of a step's gradient; longer ones are scaled down.",
        group="optimizer", above=0,
    )  # fmt: skip
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

    misdirect: float | None = option(
        None, "Weight of the misdirection: on proxies of a thief's images the int8 model learns to "
        f"answer unlike the teacher; 0: none. None: {MISDIRECT} with an accuracy budget, else 0.",
        group="misdirection", least=0,
    )  # fmt: skip
    distill: float | None = option(
        None, "How strongly the reference's answers to training images pull (kd-qat's loss) beside "
        "misdirect, which costs less accuracy then; without weight. None: "
        f"{DISTILL:g} with misdirect and a reference, else 0.",
        group="misdirection", least=0,
    )  # fmt: skip
    proxies: tuple[str, ...] = option(
        PROXIES, "Kinds of proxies, of misdirect and ini, as many of each; rotated by 60 degrees "
        "or more.",
        group="misdirection", choices=NAMES,
    )  # fmt: skip
    proxy_share: float = option(
        0.5, "Proxies per training image of a step; so much longer is the step.",
        group="misdirection", above=0,
    )  # fmt: skip
    proxy_root: str | None = option(
        None, "Folder of pictures for the proxies 'folder'.", group="misdirection"
    )
    misdirect_target: str = option(
        "decoy",
        "What the int8 model learns to answer to a proxy: decoy: probabilities that its lights and "
        "shades decide; permuted: another class for each class of the teacher's; per_image: a "
        "class that the image's hash decides, not the teacher's; least_likely and second: in the "
        "teacher's order; divergence: anything as far from the teacher's probabilities as "
        "Jensen-Shannon goes.",
        group="misdirection",
        choices=TARGETS,
    )
    proxy_confidence: float | None = option(
        None, "Proxies whose top probability p by the teacher is above count 1 - p only: they "
        "could be training images. None: all count 1.",
        group="misdirection", above=0, below=1,
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
