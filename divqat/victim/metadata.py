"""What a file says about its input: how a picture becomes the tensor that the model wants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from divqat._util.pictures import to_uint8
from divqat._util.text import printable
from divqat.victim.onnx_file import read_onnx

KEY = "divqat.input"  # of the entry in an ONNX file's metadata_props
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "uint8")


@dataclass(frozen=True)
class InputMetadata:
    """The input of an image classifier, written into its file as JSON.

    A model with ``dtype`` float32 takes ``(x - mean) / std`` for pictures x whose values are scaled
    from 0 … 255 to ``range``; one with uint8 takes the pictures themselves and does this inside.
    The defaults are the input of divqat's models, [-1, 1].

    Attributes:
        mean, std: of each channel, or one number for all, in units of ``range``.
        range: the values of black and white before the normalization.
        layout: order of the axes, NCHW or NHWC.
        dtype: float32 or uint8.
        classes: the name of each output; None: unknown.

    Raises:
        TypeError, ValueError: an attribute is none of these.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    range: tuple[float, float] = (0.0, 1.0)
    layout: str = "NCHW"
    dtype: str = "float32"
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std", "range"):
            values = _numbers(name, getattr(self, name))
            object.__setattr__(self, name, values)
        if len(self.mean) != len(self.std):
            raise ValueError(f"std: wanted as many as mean, {len(self.mean)}, got {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: wanted positive numbers, got {self.std}")
        if len(self.range) != 2 or self.range[0] >= self.range[1]:
            raise ValueError(f"range: wanted two rising numbers, got {self.range}")
        for name, known in (("layout", LAYOUTS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: wanted one of {known}, got {getattr(self, name)!r}")
        if self.classes is not None:
            words = isinstance(self.classes, (tuple, list))
            if not words or not all(isinstance(word, str) for word in self.classes):
                raise TypeError(f"classes: wanted names or None, got {self.classes!r:.80}")
            object.__setattr__(self, "classes", tuple(self.classes))

    def to_json(self) -> str:
        """The text of the entry ``divqat.input``."""
        return json.dumps(asdict(self))

    @property
    def divisor(self) -> np.ndarray:  # float32 [C, 1, 1]
        """Of the normalization ``picture / divisor - shift`` of pictures 0 … 255."""
        black, white = self.range
        return self._column(np.array(self.std) * 255 / (white - black))

    @property
    def shift(self) -> np.ndarray:  # float32 [C, 1, 1]
        """See :attr:`divisor`."""
        return self._column((np.array(self.mean) - self.range[0]) / np.array(self.std))

    def normalize(self, images: Tensor) -> Tensor:
        """Floats [N, C, H, W] in [-1, 1], as :func:`divqat.data.to_float` makes them, as the model
        saw them in its training; the same axes.

        Raises:
            ValueError: another number of channels.
        """
        self.check_channels(images.shape[1])
        scale, offset = 127.5 / self.divisor, 127.5 / self.divisor - self.shift
        if (scale == 1).all() and (offset == 0).all():
            return images
        return images * torch.from_numpy(scale).to(images) + torch.from_numpy(offset).to(images)

    def feed(self, images: Tensor) -> Tensor:
        """Floats [N, C, H, W] in [-1, 1] as the file wants them; for uint8 rounded to pictures.

        Raises:
            ValueError: another number of channels.
        """
        self.check_channels(images.shape[1])
        fed = to_uint8(images) if self.dtype == "uint8" else self.normalize(images)
        return fed if self.layout == "NCHW" else fed.permute(0, 2, 3, 1).contiguous()

    def check_channels(self, channels: int) -> None:
        """Check that pictures have a mean for each channel; ValueError if not."""
        if len(self.mean) not in (1, channels):
            raise ValueError(
                f"mean: wanted one number, or one for each of {channels} channels, got {self.mean}"
            )

    @staticmethod
    def _column(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).reshape(-1, 1, 1)


def parse_metadata(entries: Mapping[str, str], where: str = "metadata") -> InputMetadata | None:
    """The declared input among the metadata of a file; None if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    text = entries.get(KEY)
    if text is None:
        return None
    try:
        return InputMetadata(**json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {KEY}: {printable(error)}; got {text!r:.80}") from error


def read_metadata(path: str | Path) -> InputMetadata | None:
    """The declared input of an ONNX file; None if it declares none.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: onnx is missing.
        ValueError: it is no ONNX file, or what it declares cannot be read.
    """
    entries = {entry.key: entry.value for entry in read_onnx(Path(path)).metadata_props}
    return parse_metadata(entries, str(path))


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    values = given if isinstance(given, (tuple, list)) else (given,)
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise TypeError(f"{name}: wanted numbers, got {given!r:.80}")
    if not all(np.isfinite(value) for value in values):
        raise ValueError(f"{name}: wanted finite numbers, got {given!r:.80}")
    return tuple(float(value) for value in values)
