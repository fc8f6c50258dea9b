"""Trained networks, to see the defense without training it: three data sets, one seed.

Each data set has a full-precision network, and from it plain QAT and DivQAT, both also as int8 ONNX
files. ``zoo/README.md`` has a card for each. The files are in the folder ``zoo`` of a checkout, and
part of an installed package.

Example:
    >>> import divqat
    >>> model = divqat.zoo.load("fashion-mnist-divqat")
    >>> sum(parameter.numel() for parameter in model.parameters())
    158090
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from divqat._util.errors import unknown_name
from divqat._util.files import load_checkpoint, read_json
from divqat.train.config import TrainConfig
from divqat.train.folder import restore

__all__ = ["card", "load", "names", "path"]

_INSTALLED, _CHECKOUT = Path(__file__).parent / "files", Path(__file__).parents[2] / "zoo"
_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
_CARDS = "cards.json"


def names() -> tuple[str, ...]:
    """The names of the networks: a data set, and ``fp``, ``qat`` or ``divqat``."""
    return tuple(_cards())


def card(name: str) -> dict[str, Any]:
    """What is known of a network: data and license, training, accuracy (shares in [0, 1], of the
    test set), SHA-256 of the files, and of an int8 network the clones that thieves made of it.

    Raises:
        ValueError: an unknown name.
    """
    cards = _cards()
    if name not in cards:
        raise unknown_name("network", name, list(cards))
    return cards[name]


def path(name: str) -> Path:
    """The int8 network as an ONNX file, as ``divqat export`` wrote it.

    Raises:
        ValueError: an unknown name, or a full-precision network, which is not exported.
    """
    if card(name)["method"] == "fp":
        raise ValueError(f"name: wanted an int8 network, got {name!r}, which is full precision")
    return _FOLDER / f"{name}.onnx"


def load(name: str) -> nn.Module:
    """A network in eval mode, on the CPU: ``fp`` in full precision, the others prepared, as
    :func:`divqat.prepare` makes them; :func:`divqat.convert` makes these what is in the ONNX file.

    It maps float32 images [N, C, H, W] to logits [N, num_classes]; ``card(name)["shape"]`` has
    their sizes. Images are (pixel / 255 - 0.5) / 0.5, so between -1 and 1.

    Raises:
        ValueError: an unknown name, or the file is damaged.
    """
    card(name)  # refuses unknown names
    file = _FOLDER / f"{name}.pt"
    state = load_checkpoint(file)
    return restore(TrainConfig.from_dict(state["config"], where=str(file)), state, file)


def _cards() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in read_json(_FOLDER / _CARDS)["cards"]}
