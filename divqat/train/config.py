"""The settings of one training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from divqat import data, models
from divqat.data.pictures import STREAM
from divqat.ops.divergence_loss import CLASSES, DIRECTIONS
from divqat.options import Options, option
from divqat.quantize.config import PRESETS
from divqat.train import checks
from divqat.train.methods import METHODS, Method

PRECISIONS = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("sgd", "lars", "lamb")
# Exponent of batch_size / base_batch_size in the learning rate.
LR_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
# What a run has to share with its teacher.
SHARED = ("dataset", "data_root", "image_size", "validation_fraction", "model")
LOSS = ("weight", "temperature", "direction", "classes", "bound", "guard", "warmup_epochs")


def _defaults(setting: str) -> str:
    """What a setting is if it is left open, by method."""
    values = {name: getattr(method, setting) for name, method in METHODS.items() if method.sign}
    return ", ".join(f"{value} for {name}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """What :func:`divqat.train.train` does; each field is a flag of ``divqat train`` and a key of
    its YAML files.

    Raises:
        ConfigError: a value of a wrong type or out of range, or values that contradict each other.
    """

    method: str = option(
        "fp",
        "; ".join(f"{name}: {method.help}" for name, method in METHODS.items()) + ".",
        group="what to train",
        choices=METHODS,
    )
    teacher: str | None = option(
        None,
        "Run folder of a finished fp or nasty training, for all methods but fp. Quantized models "
        "start from its weights; divqat, kd-qat and nasty learn from its answers.",
        group="what to train",
    )
    model: str = option("lenet", "Network.", group="what to train", choices=models.names())

    dataset: str = option("digits", "Data set to learn.", group="data", choices=data.names())
    data_root: str | None = option(
        None, "Folder with the data set's files, where they are not found by themselves.",
        group="data",
    )  # fmt: skip
    image_size: int = option(
        32, "Height and width for gtsrb and folder, whose pictures vary in size.",
        group="data", least=8,
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
        10, "Passes over the training images; ptq needs no more than 1.", group="optimizer", least=1
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
        f"plain qat or fp. None: {_defaults('weight')}.",
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

    preset: str = option(
        "x86", "Runtime whose int8 scheme is trained for.", group="quantization", choices=PRESETS
    )
    weight_bits: int = option(8, "Bits of a weight.", group="quantization", least=2, most=8)
    activation_bits: int = option(
        8, "Bits of an activation.", group="quantization", least=2, most=8
    )
    ranges: str = option(
        "auto",
        "Activations of a batch are quantized with the range that includes it (exact) or the one "
        "before it (delayed); auto: exact, but delayed with several processes or parts.",
        group="quantization",
        choices=("auto", "exact", "delayed"),
    )
    freeze_observers_epoch: int | None = option(
        None,
        "Epoch (from 1) from which activation ranges stay fixed; beyond the last: never. "
        "None: the last third of the epochs.",
        group="quantization",
        least=2,
    )
    freeze_batchnorm_epoch: int | None = option(
        None, "Epoch from which BatchNorm statistics stay fixed; as above.",
        group="quantization", least=1,
    )  # fmt: skip

    precision: str = option(
        "float32",
        "Autocast of forward and backward; scales, loss and weights stay in float32. With float16 "
        "the loss is scaled, and a step whose gradients overflow is skipped.",
        group="speed",
        choices=PRECISIONS,
    )
    compile: bool = option(
        False, "torch.compile the model, whole; the first steps take minutes.", group="speed"
    )
    cuda_graph: bool = option(
        False, "Capture the whole step once and replay it: same bits, no launches one by one.",
        group="speed",
    )  # fmt: skip
    cache_teacher: bool = option(
        False,
        "Ask the teacher about every training image once, and keep its answers in the run folder; "
        "without pad and flip, as they belong to the images as they are.",
        group="speed",
    )

    save_as_codes: bool = option(
        False, "Keep quantized activations for the backward pass as 8-bit codes: less memory, more "
        "time, same bits.",
        group="speed",
    )  # fmt: skip

    seed: int = option(
        0, "Everything random follows from it: initial weights, order of the images, shifts.",
        group="running", least=0,
    )  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: cuda if there.", group="running")
    threads: int | None = option(
        None, "CPU threads; None: all. The last bits of a result can depend on it.",
        group="running", least=1,
    )  # fmt: skip
    deterministic: bool = option(
        False, "Slower algorithms that give the same bits on a GPU every time.", group="running"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "direction"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.kind, name))
        checks.check_settings(self)
        self.check_team(1)

    @property
    def kind(self) -> Method:
        """What the method is like."""
        return METHODS[self.method]

    def check_team(self, processes: int, device: str = "cuda") -> None:
        """Whether so many processes, on devices of this type, can do the steps.

        Raises:
            ConfigError: fewer images per step than parts; exact ranges, which a layer would have
                to know of the whole batch while that is spread over several parts; or a graph
                without a GPU, or of collectives.
        """
        checks.check_team(self, processes, device)

    def delayed(self, processes: int = 1) -> bool:
        """Whether activations are quantized with the range before the batch."""
        return self.ranges == "delayed" or processes * self.accumulate > 1

    def frozen(self, what: str, epoch: int) -> bool:
        """Whether ``what`` ("observers" or "batchnorm") is frozen in ``epoch``, counted from 1."""
        first = getattr(self, f"freeze_{what}_epoch")
        if first is None and self.method == "ptq":  # its passes have no other purpose
            return False
        if first is None:  # the last third, at least the last; never in a single epoch
            first = max(2, self.epochs + 1 - max(1, round(self.epochs / 3)))
        return epoch >= first

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        if self.method == "ptq":
            return 0.0
        steps = self.epochs * steps_per_epoch
        warmup = self.lr_warmup_epochs * steps_per_epoch
        # Goyal et al. 2017, §2.1 (linear); Krizhevsky 2014, §5 (square root)
        scale = (self.batch_size / self.base_batch_size) ** LR_SCALING[self.lr_scaling]
        if self.method != "fp" and self.frozen("batchnorm", 1 + step // steps_per_epoch):
            scale = min(scale, 1.0)  # what divqat.train.collapse is about
        lr = self.lr * scale
        if self.schedule == "one-cycle":
            warmup = warmup or 0.3 * steps
            if step < warmup:  # half a cosine from lr/25 to lr (Smith and Topin 2018)
                rise = (1 - math.cos(math.pi * step / warmup)) / 2
                return lr * (1 + 24 * rise) / 25
        elif step < warmup:
            return lr * (step + 1) / math.ceil(warmup)
        # lr_t = lr / 2 * (1 + cos(pi * t / T))
        return lr / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
