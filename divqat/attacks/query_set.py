"""Query sets as text: ``NAME``, ``NAME:COUNT``, or several of these joined by ``+``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divqat._util.seeds import derived_seed
from divqat._util.settings import ConfigError
from divqat.data import Splits, transfer_names, transfer_set

OWN = "own"  # not a transfer set: it comes with the victim's data
FOLDER = "folder"
NAMES = (*transfer_names(), OWN)


@dataclass(frozen=True)
class Part:
    """Images of one source; ``count`` None: all of them, or what a limit leaves."""

    name: str
    count: int | None


def parse_query_set(text: str) -> tuple[Part, ...]:
    """``"own:1500+openclipart"`` as ``(Part("own", 1500), Part("openclipart", None))``.

    Raises:
        ConfigError: an unknown or repeated name, or a count that is no whole number above 0.
    """
    parts = []
    for piece in text.split("+"):
        name, colon, count = piece.partition(":")
        if name not in NAMES:
            where = "" if name == text else f" in {text!r}"
            raise ConfigError(
                f"query_set: wanted one of {', '.join(NAMES)}, each with :COUNT or not, or several "
                f"joined by +, got {name!r}{where}"
            )
        if colon and not (count.isascii() and count.isdigit() and int(count)):
            raise ConfigError(
                f"query_set: wanted {name}:COUNT with a whole number above 0, got {piece!r}"
            )
        parts.append(Part(name, int(count) if colon else None))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ConfigError(f"query_set: wanted each source once, got {text!r}")
    return tuple(parts)


def load_query_set(text: str, splits: Splits, root: str | None, limit: int | None) -> Tensor:
    """The images of a query set, uint8 [N, C, H, W]; the same for every seed. Those of several
    parts are in random order.

    ``own`` is the victim's validation split, on which it was not trained; fewer are drawn from it
    at random, and are among those of a larger count. A part without a count gets what ``limit``
    leaves; several share it equally.

    Args:
        text: see :func:`parse_query_set`.
        splits: the victim's data.
        root: the folder of the pictures; in a mixture with ``folder`` only of these.
        limit: largest number of images of all parts together; None: there is none.

    Raises:
        ConfigError: more ``own`` images than there are, or than the limit.
        Others: see :func:`divqat.data.transfer_set`.
    """
    parts = parse_query_set(text)
    images = []
    for part, count in zip(parts, _counts(text, parts, limit), strict=True):
        if part.name == OWN:
            images.append(_own(splits, part, count))
            continue
        images.append(
            transfer_set(
                part.name,
                channels=splits.channels,
                image_size=splits.image_size,
                data_root=root if part.name == FOLDER or not _has_folder(parts) else None,
                limit=count,
            )
        )
    if len(parts) == 1:
        return images[0]
    mixed = torch.cat(images)
    return mixed[torch.randperm(len(mixed), generator=_generator())]


def _has_folder(parts: tuple[Part, ...]) -> bool:
    return any(part.name == FOLDER for part in parts)


def _counts(text: str, parts: tuple[Part, ...], limit: int | None) -> list[int | None]:
    """The number of images of each part; None: all that there are."""
    given = sum(part.count or 0 for part in parts)
    free = sum(part.count is None for part in parts)
    if limit is None:
        return [part.count for part in parts]
    if given + free > limit:
        raise ConfigError(
            f"query_set: wanted at most {limit} images, the limit, got {text!r} with "
            f"{given}{' and more' if free else ''}"
        )
    shares = iter((limit - given + number) // free for number in reversed(range(free)))
    return [next(shares) if part.count is None else part.count for part in parts]


def _own(splits: Splits, part: Part, count: int | None) -> Tensor:
    validation = splits.validation
    if part.count is not None and part.count > len(validation):
        raise ConfigError(
            f"query_set: wanted at most {len(validation)} own images, the validation split of "
            f"{splits.name}, got {part.name}:{part.count}"
        )
    if count is None or count >= len(validation):
        return validation.subset(slice(None)).images
    # A split may be sorted by class.
    return validation.subset(torch.randperm(len(validation), generator=_generator())[:count]).images


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(0, "query set"))
