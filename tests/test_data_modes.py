"""Pictures of every mode that Pillow opens: read right, or refused by name."""

import warnings

import numpy as np
import pytest
import torch

from divqat import data
from divqat.data.modes import UnknownScale, to_rgba
from divqat.data.pictures import decode, is_grey
from divqat.data.transfer import transfer_set

Image = pytest.importorskip("PIL.Image")
ImageMode = pytest.importorskip("PIL.ImageMode")

# Per mode a picture of one color, and that color on white: red, green, blue.
RED, HALF_RED = (255, 0, 0), (255, 127, 127)


def palette(mode, transparency=None, color=0):
    """Red, then green, with an opacity each."""
    picture = Image.new(mode, (4, 4), color)
    picture.putpalette([*RED, 0, 255, 0])
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


def sixteen(value, mode="I;16", dtype="<u2"):
    return Image.frombytes(mode, (4, 4), np.full((4, 4), value, dtype).tobytes())


def with_info(picture, **info):
    picture.info.update(info)
    return picture


TABLE = {
    "1": (lambda: Image.new("1", (4, 4), 1), (255, 255, 255)),
    "1, black": (lambda: Image.new("1", (4, 4), 0), (0, 0, 0)),
    "L": (lambda: Image.new("L", (4, 4), 100), (100, 100, 100)),
    "L, transparent": (lambda: with_info(Image.new("L", (4, 4), 9), transparency=9), (255,) * 3),
    "LA": (lambda: Image.new("LA", (4, 4), (0, 51)), (204, 204, 204)),
    "La": (lambda: Image.new("La", (4, 4), (0, 51)), (204, 204, 204)),
    "P": (lambda: palette("P"), RED),
    "P, opacities": (lambda: palette("P", bytes([128, 255])), HALF_RED),
    "P, transparent": (lambda: palette("P", 0), (255, 255, 255)),
    "P, another transparent": (lambda: palette("P", 1), RED),
    "PA": (lambda: palette("PA", color=(0, 128)), HALF_RED),
    "RGB": (lambda: Image.new("RGB", (4, 4), (10, 20, 30)), (10, 20, 30)),
    "RGB, transparent": (
        *(lambda: with_info(Image.new("RGB", (4, 4), RED), transparency=RED), (255, 255, 255)),
    ),
    "RGBA": (lambda: Image.new("RGBA", (4, 4), (255, 0, 0, 128)), HALF_RED),
    "RGBa": (lambda: Image.new("RGBa", (4, 4), (128, 0, 0, 128)), HALF_RED),
    "RGBX": (lambda: Image.new("RGBX", (4, 4), (10, 20, 30, 0)), (10, 20, 30)),
    "CMYK": (lambda: Image.new("CMYK", (4, 4), (0, 255, 255, 0)), RED),
    "CMYK, black": (lambda: Image.new("CMYK", (4, 4), (0, 0, 0, 255)), (0, 0, 0)),
    "YCbCr": (lambda: Image.new("YCbCr", (4, 4), (76, 85, 255)), RED),
    "HSV": (lambda: Image.new("HSV", (4, 4), (0, 255, 255)), RED),
    "LAB": (lambda: Image.new("LAB", (4, 4), (255, 128, 128)), (255, 255, 255)),
    "I;16": (lambda: sixteen(25700), (100, 100, 100)),
    "I;16, black": (lambda: sixteen(128), (0, 0, 0)),
    "I;16, nearly black": (lambda: sixteen(129), (1, 1, 1)),
    "I;16, white": (lambda: sixteen(65535), (255, 255, 255)),
    "I;16, transparent": (lambda: with_info(sixteen(77), transparency=77), (255, 255, 255)),
    "I;16L": (lambda: sixteen(25700, "I;16L"), (100, 100, 100)),
    "I;16B": (lambda: sixteen(25700, "I;16B", ">u2"), (100, 100, 100)),
    "I;16N": (lambda: sixteen(25700, "I;16N", "=u2"), (100, 100, 100)),
    "I": (lambda: Image.new("I", (4, 4), 25700), None),
    "F": (lambda: Image.new("F", (4, 4), 0.5), None),
}  # fmt: skip
each = pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())


def on_white(rgba):
    pixels = np.asarray(rgba).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


@each
def test_a_picture_of_each_mode(case):
    make, color = case
    if color is None:
        with pytest.raises(UnknownScale, match=f"got Pillow's mode {make().mode}, which does not"):
            to_rgba(make())
        return
    rgba = to_rgba(make())
    assert rgba.mode == "RGBA"
    # Premultiplied colors are rounded twice, and CIELAB is by a profile.
    np.testing.assert_allclose(on_white(rgba), np.broadcast_to(color, (4, 4, 3)), atol=1.6)


def test_the_table_has_every_mode_that_pillow_knows():
    known = {make().mode for make, _ in TABLE.values()}
    for mode in Image.MODES:
        assert mode in known
    for mode in ("RGBX", "RGBa", "La", "PA", "I;16", "I;16L", "I;16B", "I;16N"):
        assert mode in known


FORMATS = {"png": "PNG", "tif": "TIFF", "pgm": "PPM", "gif": "GIF", "bmp": "BMP"}


@each
@pytest.mark.parametrize("suffix", FORMATS)
def test_files_of_each_mode(case, suffix, tmp_path):
    make, color = case
    path = tmp_path / f"picture.{suffix}"
    picture = make()
    try:
        options = {"transparency": picture.info["transparency"]} if picture.info else {}
        picture.save(path, FORMATS[suffix], **options)
        with Image.open(path) as file:
            mode, kept = (
                file.mode,
                file.info.get("transparency") == picture.info.get("transparency"),
            )
    except Exception:
        return  # Pillow does not write this mode so
    if mode != picture.mode or not kept or (picture.info and not options):
        return  # it is another picture
    if color is None and mode == "I" and suffix in ("png", "pgm"):
        color = (100, 100, 100)  # of 16 bits
    if color is None:
        with pytest.raises(UnknownScale, match=rf"{path}: wanted .* got Pillow's mode {mode}"):
            decode([path], (2, 2), 3, "stretch")
        return
    images, _ = decode([path], (2, 2), 3, "stretch")
    wanted = torch.tensor(color).view(3, 1, 1).expand(3, 2, 2).float()
    torch.testing.assert_close(images[0].float(), wanted, rtol=0, atol=1.6)


def test_sixteen_bits_of_a_folder_are_grey_and_not_all_white(tmp_path):
    ramp = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.fromarray(np.roll(ramp, i)).save(tmp_path / name / f"{i}.png")
    assert is_grey(sorted(tmp_path.rglob("*.png")))
    for stream in ("never", "always"):
        splits = data.load("folder", data_root=tmp_path, image_size=8, stream=stream, workers=0)
        assert splits.channels == 1
        seen = torch.cat([splits.train.images, splits.test.images]).flatten(1).sort(1).values
        wanted = torch.from_numpy(ramp.flatten().astype(float) / 257).round()
        assert torch.equal(seen.double(), wanted.expand_as(seen))
    photos = transfer_set("photos", channels=1, image_size=4, data_root=tmp_path, limit=50)
    assert photos.float().std() > 20


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_mode_without_a_white_is_refused_by_name(tmp_path, stream):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / name / f"{i}.png")
    path = tmp_path / "a" / "float.tif"
    Image.new("F", (8, 8), 0.5).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=rf"{path}.*mode F, which does not define which value"):
            splits = data.load("folder", data_root=tmp_path, image_size=8, stream=stream, workers=0)
            assert [part.images for part in (splits.train, splits.validation, splits.test)]
