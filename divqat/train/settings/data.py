"""Settings of data set and network."""

from __future__ import annotations

from dataclasses import dataclass

from divqat import data, models
from divqat._util.settings import Options, option
from divqat.data.pictures import STREAM


@dataclass(frozen=True, kw_only=True)
class DataSettings(Options):
    """The data set and the network."""

    model: str = option(
        "lenet", "Network; ensemble: averages the probabilities of a vgg_small, a resnet20 and a "
        "mobilenetv2_small; your own is a function of in_channels, num_classes and image_size.",
        group="what to train", choices=(*models.names(), models.ENSEMBLE), foreign=True,
    )  # fmt: skip
    weights: str | None = option(
        None, "State dict (.pt) of the network, trained elsewhere, from which fp starts; with "
        "epochs 0 it is used unchanged.",
        group="what to train",
    )  # fmt: skip
    dataset: str = option("digits", "Data set to train on.", group="data", choices=data.names())
    data_root: str | None = option(
        None, "Folder with the data set's files, if they are not found automatically.",
        group="data",
    )  # fmt: skip
    image_size: int = option(
        32, "Height and width of images from gtsrb and folder, in pixels.",
        group="data", least=8, most=2048,
    )  # fmt: skip
    validation_fraction: float = option(
        0.1, "Fraction of the training images held out for validation.",
        group="data", above=0, below=1,
    )  # fmt: skip
    stream: str = option(
        "auto",
        "Decode images of gtsrb and folder on demand instead of holding all in memory; auto: if "
        "they would take more than 4 GiB. The batches are the same.",
        group="data",
        choices=STREAM,
    )
    workers: int | None = option(
        None, "Worker processes that decode streamed images; 0: decode in the training process. "
        "None: one less than CPU cores, divided among the processes of torchrun.",
        group="data", least=0,
    )  # fmt: skip
    pad: int = option(
        0,
        "Augmentation: shift each training image at random by up to this many pixels.",
        group="data",
        least=0,
    )
    flip: bool = option(False, "Augmentation: mirror training images at random.", group="data")
