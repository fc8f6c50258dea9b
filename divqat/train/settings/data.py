"""What is learned, and by which network."""

from __future__ import annotations

from dataclasses import dataclass

from divqat import data, models
from divqat._util.settings import Options, option
from divqat.data.pictures import STREAM


@dataclass(frozen=True, kw_only=True)
class DataSettings(Options):
    """The data set and the network."""

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
