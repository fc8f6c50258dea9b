"""The pixel modes of Pillow: each is converted correctly or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np

# Modes that Pillow converts correctly, including transparency: 8 bits per channel, or 1.
PLAIN = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}  # without color
SIXTEEN_BITS = GREY - {"1", "L", "LA", "La", "I"}
# Mode I has 32 bits, but files of these formats have 16-bit values.
SIXTEEN_BIT_FORMATS = {"PNG", "PPM"}


class UnknownScale(ValueError):
    """A picture whose pixel mode does not define which value is white."""


def to_rgba(picture: Any) -> Any:
    """A ``PIL.Image`` of any mode in mode RGBA; 16 bits are rounded to 8.

    Raises:
        UnknownScale: the mode is unknown, or does not define which value is white.
    """
    mode = picture.mode
    if mode in PLAIN:
        return picture.convert("RGBA")
    if mode == "La":  # grey, premultiplied by alpha
        return picture.convert("LA").convert("RGBA")
    if mode in SIXTEEN_BITS or (mode == "I" and picture.format in SIXTEEN_BIT_FORMATS):
        return _from_sixteen_bits(picture)
    raise UnknownScale(
        f"{getattr(picture, 'filename', 'a picture')}: wanted pixels of 8 or 16 bits, got Pillow's "
        f"mode {mode}, which does not define which value is white; save it as a PNG"
    )


def on_white(picture: Any) -> Any:
    """An RGBA picture on a white background."""
    from PIL import Image

    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas


def _from_sixteen_bits(picture: Any) -> Any:
    from PIL import Image

    values = np.asarray(picture).astype(np.uint32)  # [H, W]
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    alpha = np.full_like(grey, 255)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        alpha[values == transparent] = 0
    return Image.merge("RGBA", [Image.fromarray(channel) for channel in (*[grey] * 3, alpha)])
