"""The widths of single layers' weights, as text and as a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from divqat._util.files import read_json
from divqat._util.settings import ConfigError

WANTED = "the mixed_precision.json of divqat sensitivity RUN --mixed-precision BUDGET"


def parse_layer_bits(items: Iterable[str] | None) -> dict[str, int]:
    """``{layer: bits}`` from texts ``layer=bits``; empty for None.

    Raises:
        ConfigError: another text, a width outside 2 to 8, or a layer that is named twice.
    """
    found = dict[str, int]()
    for item in items or ():
        name, equals, width = item.rpartition("=")
        if not (name and equals and width in tuple("2345678")):
            raise ConfigError(f"layer_bits: wanted LAYER=BITS with 2 to 8 bits, got {item!r}")
        if name in found:
            raise ConfigError(f"layer_bits: wanted each layer once, got {name!r} twice")
        found[name] = int(width)
    return found


def format_layer_bits(bits: Mapping[str, int]) -> tuple[str, ...]:
    """The texts that :func:`parse_layer_bits` reads."""
    return tuple(f"{name}={width}" for name, width in bits.items())


def read_layer_bits(path: str | Path) -> dict[str, int]:
    """``{layer: bits}`` from a file of ``divqat sensitivity --mixed-precision``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or another file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"layer_bits: wanted {WANTED}, got no file at {path}")
    data = read_json(path)
    if "layer_bits" not in data:
        keys = ", ".join(map(str, list(data)[:5])) or "none"
        raise ValueError(f"{path}: wanted {WANTED}, with the key layer_bits, got the keys {keys}")
    bits = data["layer_bits"]
    if not isinstance(bits, dict) or not bits:
        raise ValueError(f"{path}: layer_bits: wanted bits by layer, got {str(bits)[:80]!r}")
    for name, width in bits.items():
        if type(width) is not int or not 2 <= width <= 8:
            raise ValueError(
                f"{path}: layer_bits: wanted 2 to 8 bits for {name!r}, got {str(width)[:40]!r}"
            )
    return dict(bits)


def expand_layer_bits(items: Sequence[str]) -> tuple[str, ...]:
    """The value of a flag: texts ``layer=bits``, or the path of a file in place of them.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_layer_bits`.
    """
    if len(items) == 1 and (Path(items[0]).is_file() or "=" not in items[0]):
        return format_layer_bits(read_layer_bits(items[0]))
    return tuple(items)
