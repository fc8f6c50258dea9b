"""Folders of picture files (PNG, JPEG, PPM ...), decoded to one size with Pillow."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from divqat._util.bounds import MAX_PIXELS, MAX_TABLE, check_file, check_inside, check_tree
from divqat._util.errors import require
from divqat._util.progress import progress
from divqat._util.text import printable
from divqat.data import streaming
from divqat.data.modes import GREY, UnknownScale, to_rgba
from divqat.data.sets import ImageSet, LabeledImages

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# The formats of these suffixes, for any file name: Pillow would also run EPS in Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
Fit = Literal["stretch", "crop", "contain"]
GTSRB_CLASSES = 43
STREAM = ("auto", "always", "never")
Row = tuple[Path, int]  # picture file and label


def list_pictures(
    root: str | Path, *, within: Path | None = None, links: bool = True
) -> list[Path]:
    """All picture files below ``root``, sorted.

    Args:
        root: the folder.
        within: a parent folder into which links may point; None: ``root``.
        links: include symbolic links.

    Raises:
        ValueError: a link points elsewhere, or a file is a pipe, a device ...
    """
    paths = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    )
    paths = [path for path in paths if links or not path.is_symlink()]
    for path in paths:
        check_inside(path, within or root)
    return paths


def open_picture(path: str | Path) -> Any:
    """A ``PIL.Image`` whose pixels have not been read."""
    from PIL import Image

    return Image.open(path, formats=FORMATS)


def check_pixels(picture: Any) -> None:
    """Check that a picture has at most ``MAX_PIXELS`` pixels (about half a gigabyte decoded);
    ValueError if not."""
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"wanted at most {MAX_PIXELS} pixels, got {list(picture.size)}")


def _open(path: str | Path, size: tuple[int, int], channels: int, fit: Fit) -> np.ndarray:
    from PIL import Image, ImageOps

    height, width = size
    with open_picture(path) as file:
        file.draft("RGB", (2 * width, 2 * height))  # decodes a JPEG at a smaller size, much faster
        check_pixels(file)
        picture = to_rgba(file)
    if fit == "contain":
        picture = ImageOps.contain(picture, (width, height), Image.Resampling.BILINEAR)
    elif fit == "crop":
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    else:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGBA", (width, height), "white")
    corner = ((width - picture.width) // 2, (height - picture.height) // 2)
    canvas.alpha_composite(picture, corner)
    pixels = np.asarray(canvas.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _open_or_none(path: Path, **options: Any) -> np.ndarray | None:
    try:
        return _open(path, **options)
    except UnknownScale:
        raise
    except Exception:  # a damaged file may raise anything
        return None


def _open_alone(path: str, **options: Any) -> np.ndarray:
    """Like :func:`decode` of one file, but a damaged or too large one is an error. Not thread-safe,
    as threads share the warning filters."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return _open(path, **options)


def decode(
    paths: Sequence[Path], size: tuple[int, int], channels: int, fit: Fit
) -> tuple[Tensor, list[int]]:
    """Decode picture files; transparent parts become white.

    Args:
        paths: the files.
        size: (H, W) of the result.
        channels: 1 (grey) or 3 (RGB).
        fit: ``stretch`` to the size, ``crop`` to its aspect ratio around the center, or
            ``contain``: the whole picture, on white.

    Returns:
        uint8 [M, C, H, W] and the M indices into ``paths`` of the readable files. Damaged files
        and those beyond Pillow's size limit are left out, with one warning that counts them.

    Raises:
        ValueError: ``channels`` is neither 1 nor 3, no file is readable, or the mode of a file does
            not define which value is white.
        ImportError: Pillow is missing.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    Image: Any = require("PIL.Image", "data")
    # Decoding releases the GIL, so threads suffice.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = pool.map(partial(_open_or_none, size=size, channels=channels, fit=fit), paths)
        pixels = list(progress(opened, "decoding pictures", total=len(paths)))
    readable = [(i, array) for i, array in enumerate(pixels) if array is not None]
    if not readable:
        where = f", the first is {paths[0]}" if paths else ""
        raise ValueError(f"none of {len(paths)} picture files is readable{where}")
    if len(readable) < len(paths):
        bad = next(path for path, array in zip(paths, pixels, strict=True) if array is None)
        warnings.warn(
            f"left out {len(paths) - len(readable)} of {len(paths)} picture files (damaged or too "
            f"large), the first is {printable(bad)}",
            stacklevel=2,
        )
    return torch.from_numpy(np.stack([array for _, array in readable])), [i for i, _ in readable]


@dataclass(frozen=True)
class Reading:
    """How the pictures of a data set become sets of square images.

    Args:
        size: height and width.
        stream: ``always``: a :class:`StreamedSet`, decoded batch by batch; ``never``: an
            :class:`ImageSet`, decoded now; ``auto``: streamed if the images of all splits together
            are more than ``streaming.STREAM_ABOVE`` bytes.
        workers: processes that decode streamed pictures, see :class:`Decoder`.
    """

    size: int
    stream: str = "auto"
    workers: int | None = None

    def sets(
        self, splits: Sequence[Sequence[Row]], channels: int, fit: Fit
    ) -> list[tuple[LabeledImages, list[int]]]:
        """The set of each split, and the indices of its rows; those of damaged pictures are missing
        if pictures are decoded now."""
        shape = (channels, self.size, self.size)
        nbytes = sum(map(len, splits)) * math.prod(shape)
        if self.stream == "never" or (self.stream == "auto" and nbytes <= streaming.STREAM_ABOVE):
            return [_decoded(rows, self.size, channels, fit) for rows in splits]
        require("PIL.Image", "data")
        read = partial(_open_alone, size=shape[1:], channels=channels, fit=fit)
        decoder = streaming.Decoder(read, shape, self.workers)
        return [(_streamed(rows, decoder), list(range(len(rows)))) for rows in splits]


def _decoded(
    rows: Sequence[Row], size: int, channels: int, fit: Fit
) -> tuple[LabeledImages, list[int]]:
    images, kept = decode([path for path, _ in rows], (size, size), channels, fit)
    return ImageSet(images, torch.tensor([rows[i][1] for i in kept])), kept


def _streamed(rows: Sequence[Row], decoder: streaming.Decoder) -> streaming.StreamedSet:
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    return streaming.StreamedSet([str(path) for path, _ in rows], labels, decoder)


def _gtsrb_table(path: Path) -> list[tuple[str, int]]:
    """(file name, class) of each row of a GTSRB table."""
    check_file(path, MAX_TABLE)
    with open(path, encoding="utf-8", newline="") as file:
        try:
            rows = [
                (row["Filename"], int(row["ClassId"]))
                for row in csv.DictReader(file, delimiter=";")
            ]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(
                f"{path} must have the columns Filename;...;ClassId, separated by ';': {error!r}"
            ) from error
    for name, label in rows:
        if Path(name).name != name or not 0 <= label < GTSRB_CLASSES:
            raise ValueError(
                f"{path}: wanted names of files in its folder and classes below {GTSRB_CLASSES}, "
                f"got {name!r} and {label}"
            )
    return rows


def read_gtsrb(root: Path, reading: Reading) -> tuple[LabeledImages, LabeledImages, Tensor]:
    """Read the German traffic signs, as in ``GTSRB_Final_*_Images.zip`` and
    ``GTSRB_Final_Test_GT.zip``.

    Args:
        root: contains ``Final_Training/Images/00000/GT-00000.csv`` and so on, and
            ``Final_Test/Images``; ``GT-final_test.csv`` may be in ``root``, its parent, or
            ``Final_Test`` and its ``Images``.
        reading: every picture is stretched to its size; the originals vary.

    Returns:
        train, test, and the track (int64 [N]) of each training image. The thirty frames of a track
        show one sign.
    """
    for part in ("Final_Training", "Final_Test"):
        check_inside(root / part, root)
        check_tree(root / part)
    tables = sorted((root / "Final_Training" / "Images").glob("*/GT-*.csv"))
    rows = [(table.parent / name, label) for table in tables for name, label in _gtsrb_table(table)]
    pictures = root / "Final_Test" / "Images"
    folders = [root.parent, root, pictures.parent, pictures]
    tables_found = [path for f in folders if (path := f / "GT-final_test.csv").is_file()]
    if not tables_found:
        raise ValueError(f"GT-final_test.csv (from GTSRB_Final_Test_GT.zip) is missing in {root}")
    test_rows = [(pictures / name, label) for name, label in _gtsrb_table(tables_found[0])]
    (train, kept), (test, _) = reading.sets([rows, test_rows], 3, "stretch")
    tracks = [rows[i][0].name.split("_")[0] for i in kept]  # 00003_00017.ppm: track 3, frame 17
    _, numbers = np.unique(tracks, return_inverse=True)
    return train, test, torch.from_numpy(numbers)


def labeled_pictures(root: Path, classes: Sequence[str], within: Path) -> list[Row]:
    """The pictures of ``root``, which has one folder per class, with their labels.

    Args:
        root: the folder.
        classes: names of the class folders, in the order of the labels.
        within: the folder into which links may point.

    Raises:
        ValueError: a folder is not in ``classes``, there is no picture, or see
            :func:`list_pictures`.
    """
    for name in classes:
        check_inside(root / name, within)
    extra = set(class_folders(root)) - set(classes)
    if extra:
        raise ValueError(
            f"{root} has folders that are not training classes: {', '.join(sorted(extra))}"
        )
    rows = [
        (path, i)
        for i, name in enumerate(classes)
        for path in list_pictures(root / name, within=within)
    ]
    if not rows:
        raise ValueError(f"{root} has no pictures in folders named after their class")
    return rows


def class_folders(root: Path) -> list[str]:
    """Names of the folders in ``root``, sorted, without hidden ones."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def is_grey(paths: Sequence[Path]) -> bool:
    """Whether all pictures are stored without color; unreadable files are ignored."""
    require("PIL.Image", "data")

    def mode(path: Path) -> str:
        try:
            with open_picture(path) as file:
                return str(file.mode)
        except Exception:
            return "L"

    return all(mode(path) in GREY for path in paths)
