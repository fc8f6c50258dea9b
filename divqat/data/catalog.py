"""The data sets by name: the location of their files, and their conversion to :class:`Splits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from divqat._util.bounds import check_inside
from divqat._util.errors import require, unknown_name
from divqat.data import formats, pictures
from divqat.data.pictures import STREAM, Reading
from divqat.data.sets import DataNotFound, ImageSet, LabeledImages, Splits, hold_out

TEST_FRACTION = 0.2  # for data sets without a test split
PICTURES = ("gtsrb", "folder")  # data sets of picture files, which can be streamed
_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class _Raw:
    """The result of a reader; a split that the files do not have is None."""

    classes: tuple[str, ...]
    train: LabeledImages
    test: LabeledImages | None = None
    validation: LabeledImages | None = None
    groups: Tensor | None = None  # groups of the training images, int64 [N], see hold_out


@dataclass(frozen=True)
class _Source:
    """Possible layouts of a data set: the first whose folder contains ``probe`` (a glob) is read by
    ``read(folder, reading)``."""

    # (subfolder, probe, read)
    layouts: tuple[tuple[str, str, Callable[[Path, Reading], _Raw]], ...]
    remedy: str  # how to get the data
    system: str | None = None  # the folder of an operating system's package


def _digits() -> _Raw:
    digits = require("sklearn.datasets", "data").load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # the pixels are 0 ... 16
    labels = torch.from_numpy(digits.target).long()
    return _Raw(_DIGITS, ImageSet(images.round().to(torch.uint8), labels))


def _idx(folder: Path, stem: str) -> ImageSet:
    def file(name: str) -> Path:
        plain = folder / name
        return plain if plain.is_file() else folder / f"{name}.gz"

    return formats.read_idx_pair(
        file(f"{stem}-images-idx3-ubyte"), file(f"{stem}-labels-idx1-ubyte")
    )


def _fashion_mnist(folder: Path, reading: Reading) -> _Raw:
    return _Raw(_FASHION, _idx(folder, "train"), _idx(folder, "t10k"))


def _cifar10(folder: Path, reading: Reading) -> _Raw:
    batches = [folder / f"data_batch_{i}" for i in range(1, 6)]
    train = formats.read_cifar_pickles(batches, b"labels")
    test = formats.read_cifar_pickles([folder / "test_batch"], b"labels")
    return _Raw(formats.read_cifar_names(folder / "batches.meta", b"label_names"), train, test)


def _cifar10_binary(folder: Path, reading: Reading) -> _Raw:
    batches = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
    train = formats.read_cifar_binary(batches, label_bytes=1)
    test = formats.read_cifar_binary([folder / "test_batch.bin"], label_bytes=1)
    return _Raw(formats.read_cifar_names(folder / "batches.meta.txt"), train, test)


def _cifar100(folder: Path, reading: Reading) -> _Raw:
    train = formats.read_cifar_pickles([folder / "train"], b"fine_labels")
    test = formats.read_cifar_pickles([folder / "test"], b"fine_labels")
    return _Raw(formats.read_cifar_names(folder / "meta", b"fine_label_names"), train, test)


def _cifar100_binary(folder: Path, reading: Reading) -> _Raw:
    train = formats.read_cifar_binary([folder / "train.bin"], label_bytes=2)
    test = formats.read_cifar_binary([folder / "test.bin"], label_bytes=2)
    return _Raw(formats.read_cifar_names(folder / "fine_label_names.txt"), train, test)


def _svhn(folder: Path, reading: Reading) -> _Raw:
    train = formats.read_svhn(folder / "train_32x32.mat")
    return _Raw(_DIGITS, train, formats.read_svhn(folder / "test_32x32.mat"))


def _gtsrb(folder: Path, reading: Reading) -> _Raw:
    train, test, tracks = pictures.read_gtsrb(folder, reading)
    classes = tuple(f"{i:05d}" for i in range(pictures.GTSRB_CLASSES))
    return _Raw(classes, train, test, groups=tracks)


def _folder(folder: Path, reading: Reading) -> _Raw:
    split = {name: folder / name for name in ("train", "test", "val") if (folder / name).is_dir()}
    for path in split.values():
        check_inside(path, folder)
    root = split.get("train", folder)
    classes = tuple(pictures.class_folders(root))
    channels = 1 if pictures.is_grey(pictures.list_pictures(root, within=folder)) else 3
    rows = {"train": pictures.labeled_pictures(root, classes, folder)}
    filled = {label for _, label in rows["train"]}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise ValueError(
            f"{root} has class folders without a picture: {', '.join(empty)}; fill or delete them"
        )
    if "train" in split:  # otherwise all folders are classes, even one that is named test
        rows |= {name: pictures.labeled_pictures(split[name], classes, folder) for name in split}
    sets = [data for data, _ in reading.sets(list(rows.values()), channels, "crop")]
    splits = dict(zip(rows, sets, strict=True))
    return _Raw(classes, splits["train"], splits.get("test"), splits.get("val"))


_SOURCES = {
    "fashion-mnist": _Source(
        (
            ("", "train-images-idx3-ubyte*", _fashion_mnist),
            ("FashionMNIST/raw", "train-images-idx3-ubyte*", _fashion_mnist),
        ),
        "apt-get install dataset-fashion-mnist, or pass --data-root DIR "
        "with its four *-ubyte.gz files",
        system="/usr/share/datasets/fashion-mnist",
    ),
    "cifar10": _Source(
        (
            ("cifar-10-batches-py", "data_batch_1", _cifar10),
            ("", "data_batch_1", _cifar10),
            ("cifar-10-batches-bin", "data_batch_1.bin", _cifar10_binary),
            ("", "data_batch_1.bin", _cifar10_binary),
        ),
        "unpack cifar-10-python.tar.gz or cifar-10-binary.tar.gz in DIR and pass --data-root DIR",
    ),
    "cifar100": _Source(
        (
            ("cifar-100-python", "meta", _cifar100),
            ("", "meta", _cifar100),
            ("cifar-100-binary", "fine_label_names.txt", _cifar100_binary),
            ("", "fine_label_names.txt", _cifar100_binary),
        ),
        "unpack cifar-100-python.tar.gz or cifar-100-binary.tar.gz in DIR and pass --data-root DIR",
    ),
    "svhn": _Source(
        (("", "train_32x32.mat", _svhn),),
        "put train_32x32.mat and test_32x32.mat in DIR and pass --data-root DIR",
    ),
    "gtsrb": _Source(
        (("GTSRB", "Final_Training/Images", _gtsrb), ("", "Final_Training/Images", _gtsrb)),
        "unpack GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and "
        "GTSRB_Final_Test_GT.zip in DIR and pass --data-root DIR",
    ),
    "folder": _Source(
        (("", "*/", _folder),),
        "pass --data-root DIR with one folder of pictures per class, or train/ and test/ of these",
    ),
}


def find(
    places: Sequence[str | Path | None], probes: Sequence[tuple[str, str]]
) -> tuple[Path, int] | None:
    """The first folder ``place/subfolder`` that contains the glob ``probe``.

    Args:
        places: folders; None is skipped.
        probes: (subfolder, glob) pairs.

    Returns:
        The folder and the index of its probe, or None.
    """
    for place in places:
        for index, (subfolder, probe) in enumerate(probes):
            if place is not None and any((Path(place) / subfolder).glob(probe)):
                return Path(place) / subfolder, index
    return None


def names() -> list[str]:
    """The names that :func:`load` knows."""
    return ["digits", *_SOURCES]


def load(
    name: str,
    *,
    data_root: str | Path | None = None,
    validation_fraction: float = 0.1,
    image_size: int = 32,
    stream: str = "auto",
    workers: int | None = None,
) -> Splits:
    """Load a data set from this machine; nothing is ever downloaded.

    Args:
        name: one of :func:`names`.
        data_root: the folder with the data set's files, or one with a subfolder ``name`` of them;
            no other place is searched then. Not needed for ``digits``, nor for ``fashion-mnist`` if
            its Debian package is installed.
        validation_fraction: share of the training images of each class that becomes the validation
            split, which is the same in every run. Frames of one GTSRB track stay in one split.
            Unused for a ``folder`` with a ``val/``.
        image_size: height and width of ``gtsrb`` and ``folder``, whose pictures vary in size.
        stream: ``always`` leaves the pictures of ``gtsrb`` and ``folder`` in their files, and
            decodes them batch by batch: all splits are a :class:`StreamedSet`. ``never`` decodes
            them now. ``auto`` streams if the decoded images take more than 4 GiB. The batches are
            the same, bit for bit, except that damaged pictures are left out with ``never``, but
            raise an error when streamed.
        workers: number of processes that decode streamed pictures; None: number of cores minus
            one, shared by the processes of torchrun; 0: decode in this process.

    Raises:
        DataNotFound: the files are missing.
        ValueError: unknown name, a fraction outside [0, 1), ``always`` for a data set without
            picture files, negative ``workers``, or a damaged file.
        ImportError: an optional dependency for this data set is missing.
    """
    if name not in names():
        raise unknown_name("data set", name, names())
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
    if stream not in STREAM:
        raise ValueError(f"stream must be one of {', '.join(STREAM)}, got {stream!r}")
    if stream == "always" and name not in PICTURES:
        raise ValueError(f"stream must be auto or never for {name}, which has no picture files")
    if name == "digits":
        raw = _digits()
    else:
        source = _SOURCES[name]
        # With data_root, never fall back to another copy of the data.
        places = [source.system] if data_root is None else [data_root, Path(data_root) / name]
        match = find(places, [layout[:2] for layout in source.layouts])
        if match is None:
            where = "" if data_root is None else f" in {data_root}"
            raise DataNotFound(f"data set {name!r} was not found{where}: {source.remedy}")
        folder, index = match
        raw = source.layouts[index][2](folder, Reading(image_size, stream, workers))
    train, test, validation = raw.train, raw.test, raw.validation
    if test is None:
        train, test = hold_out(train, TEST_FRACTION, seed=1)
    if validation is None:
        train, validation = hold_out(train, validation_fraction, groups=raw.groups)
    return Splits(name, raw.classes, train, validation, test)
