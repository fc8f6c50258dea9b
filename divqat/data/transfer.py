"""Query sets for model extraction: images that are unrelated to the victim's classes."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from divqat._util.errors import require, unknown_name
from divqat._util.progress import progress
from divqat.data.modes import on_white, to_rgba
from divqat.data.pictures import check_pixels, decode, list_pictures, open_picture
from divqat.data.sets import DataNotFound

CLIPART_ROOT = "/usr/share/openclipart/png"
CLIPART_VARIANTS = 4  # 6,885 readable files give 27,540 queries
ICONS_ROOT = "/usr/share/icons/oxygen/base/48x48"
# The photos of scikit-image; its other files are drawings, texts, or broken on purpose.
SKIMAGE_PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
ROOT = "data_root (--query-root, of proxies --proxy-root)"  # its name in functions and commands
GENERATED = 10_000  # default number of images of `photos` and `noise`


def transfer_names() -> list[str]:
    """The names that :func:`transfer_set` knows."""
    return ["openclipart", "icons", "photos", "noise", "folder"]


def transfer_set(
    name: str,
    *,
    channels: int,
    image_size: tuple[int, int] | int,
    data_root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Tensor:
    """A set of unlabeled images for queries to a victim.

    - ``openclipart``: the 6,900 drawings of the Debian package ``openclipart-png``, or those in
      ``data_root/openclipart`` if ``data_root`` is given. First comes every file unchanged; the
      rest are variants, mirrored, rotated and cropped. Grey images with a light background are
      inverted, because Fashion-MNIST's background is dark.
    - ``icons``: likewise the 1,100 pictures of the Debian package ``oxygen-icon-theme``. Use it to
      tune a defense, so that ``openclipart`` remains unseen.
    - ``photos``: patches, at several scales, of the photos below ``data_root``; without
      ``data_root``, of those in scikit-learn and, if installed, scikit-image. Patches of these
      fifteen or so photos are correlated.
    - ``noise``: uniform noise of four grain sizes.
    - ``folder``: the pictures below ``data_root``, then, beyond their number, variants of them.

    Args:
        name: one of :func:`transfer_names`.
        channels: 1 (grey) or 3 (RGB).
        image_size: (H, W), or one number for both.
        data_root: a folder of pictures, see above.
        limit: number of images; None: four per drawing or icon, 10,000 patches or noise images, one
            per picture of a folder.
        seed: of the choice of images, their order and their variants.

    Returns:
        uint8 [N, C, H, W], in random order; a smaller ``limit`` prefers distinct files.

    Raises:
        DataNotFound: the pictures are not on this machine.
        ValueError: unknown name, channels, size or limit.
        ImportError: an optional dependency is missing.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if name not in transfer_names():
        raise unknown_name("transfer set", name, transfer_names())
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size must be (H, W), both at least 1, got {image_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    generator = Generator().manual_seed(seed)
    if name == "noise":
        return _noise(limit or GENERATED, channels, size, generator)
    if name == "photos":
        return _patches(_photos(data_root), limit or GENERATED, channels, size, generator)
    if name in ("openclipart", "icons"):
        default = CLIPART_ROOT if name == "openclipart" else ICONS_ROOT
        root = default if data_root is None else Path(data_root) / name
        package = "openclipart-png" if name == "openclipart" else "oxygen-icon-theme"
        remedy = f"apt-get install {package}, or pass {ROOT} DIR with DIR/{name}"
        # Links are second names of drawings in other categories.
        paths = _pictures(name, root, remedy, links=False)
        variants = CLIPART_VARIANTS
    else:
        paths, variants = _pictures(name, data_root, f"pass {ROOT} DIR with pictures"), 1
    return _drawings(paths, variants, limit, channels, size, generator, invert=name != "folder")


def _pictures(name: str, root: str | Path | None, remedy: str, *, links: bool = True) -> list[Path]:
    paths = [] if root is None else list_pictures(root, links=links)
    if not paths:
        where = "" if root is None else f" in {root}"
        raise DataNotFound(f"transfer set {name!r} was not found{where}: {remedy}")
    return paths


def _drawings(
    paths: list[Path],
    variants: int,
    limit: int | None,
    channels: int,
    size: tuple[int, int],
    generator: Generator,
    invert: bool,
) -> Tensor:
    """Round 0 has every picture, the following rounds have variants of every picture."""
    chosen = torch.randperm(len(paths), generator=generator)[:limit].tolist()
    # Twice the final size, so that crops and rotations still have detail.
    double, _ = decode([paths[i] for i in chosen], (2 * size[0], 2 * size[1]), channels, "contain")
    if invert and channels == 1:
        double = _darken_background(double)
    count = limit or variants * len(double)
    rounds = [_shrink(double)]
    for _ in progress(range(1, math.ceil(count / len(double))), "varying pictures"):
        order = torch.randperm(len(double), generator=generator)
        rounds.append(torch.cat([_vary(part, generator) for part in double[order].split(1024)]))
    return torch.cat(rounds)[:count]


def _to_bytes(images: Tensor) -> Tensor:
    return images.round_().clamp_(0, 255).to(torch.uint8)


def _shrink(double: Tensor) -> Tensor:
    """uint8 [N, C, 2H, 2W] to [N, C, H, W]."""
    return torch.cat([_to_bytes(F.avg_pool2d(part.float(), 2)) for part in double.split(1024)])


def _darken_background(images: Tensor) -> Tensor:
    """Invert the images whose border is light. uint8 [N, C, H, W]."""
    top_bottom, sides = images[:, :, [0, -1]].float(), images[:, :, :, [0, -1]].float()
    border = torch.cat([top_bottom.flatten(1), sides.flatten(1)], dim=1).mean(dim=1)
    return torch.where(border[:, None, None, None] > 127.5, 255 - images, images)


def _vary(double: Tensor, generator: Generator) -> Tensor:
    """Mirror, rotate by up to 30 degrees, crop to 60-100 % and halve uint8 [N, C, 2H, 2W]."""
    n, channels, height, width = double.shape
    draw = torch.rand(5, n, generator=generator)
    mirror = 1 - 2 * (draw[0] < 0.5).float()
    angle = (draw[1] - 0.5) * math.radians(60)
    zoom = 0.6 + 0.4 * draw[2]
    shift = (2 * draw[3:] - 1) * (1 - zoom)  # keeps the crop within the picture
    ratio = height / width  # grid coordinates run from -1 to 1 along both axes
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack(
        [
            torch.stack([mirror * cos, -mirror * sin * ratio, shift[0]], dim=1),
            torch.stack([sin / ratio, cos, shift[1]], dim=1),
        ],
        dim=1,
    )  # [N, 2, 3]
    grid = F.affine_grid(theta, [n, channels, height // 2, width // 2], align_corners=False)
    return _to_bytes(
        F.grid_sample(double.float(), grid, padding_mode="reflection", align_corners=False)
    )


def _photos(root: str | Path | None) -> list[Path]:
    """Photos of a folder, or of the installed packages, without importing scikit-image."""
    if root is not None:
        return _pictures("photos", root, f"pass {ROOT} DIR with photos, or none")
    shipped = Path(require("sklearn.datasets", "data").__file__).parent / "images"
    paths = list_pictures(shipped)
    skimage = importlib.util.find_spec("skimage")
    if skimage is not None and skimage.submodule_search_locations:
        folder = Path(skimage.submodule_search_locations[0]) / "data"
        paths += [path for name in SKIMAGE_PHOTOS if (path := folder / name).is_file()]
    if not paths:
        raise DataNotFound(
            f"transfer set 'photos' was not found in {shipped}: "
            "pip install scikit-learn scikit-image"
        )
    return paths


def _patches(
    paths: list[Path], count: int, channels: int, size: tuple[int, int], generator: Generator
) -> Tensor:
    """Patches at random positions of every photo at full, half, quarter ... size."""
    require("PIL.Image", "data")
    levels = []  # every photo at every size
    for path in paths:
        try:
            with open_picture(path) as file:
                check_pixels(file)
                picture = on_white(to_rgba(file)).convert("L" if channels == 1 else "RGB")
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"{path} cannot be decoded ({error!r}): delete it") from error
        pixels = np.array(picture)
        level = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)
        while level.shape[1] >= size[0] and level.shape[2] >= size[1]:
            levels.append(level)
            level = _shrink(level[None])[0]
    if not levels:
        raise ValueError(f"image_size must not exceed the photos' size, got {list(size)}")
    choice = torch.randint(len(levels), (count,), generator=generator)
    out = torch.empty(count, channels, *size, dtype=torch.uint8)
    for index, level in enumerate(levels):
        rows = (choice == index).nonzero()[:, 0]
        windows = level.unfold(1, size[0], 1).unfold(2, size[1], 1)  # a view [C, Y, X, H, W]
        y = torch.randint(windows.shape[1], (len(rows),), generator=generator)
        x = torch.randint(windows.shape[2], (len(rows),), generator=generator)
        out[rows] = windows[:, y, x].transpose(0, 1)
    return out


def _noise(count: int, channels: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Uniform noise with grains of 1, 2, 4 and 8 pixels, in turns."""
    out = torch.empty(count, channels, *size, dtype=torch.uint8)
    for i in range(4):
        grains = [math.ceil(length / 2**i) for length in size]
        shape = (len(range(i, count, 4)), channels, *grains)
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        for axis in (2, 3):
            noise = noise.repeat_interleave(2**i, dim=axis)
        out[i::4] = noise[:, :, : size[0], : size[1]]
    return out
