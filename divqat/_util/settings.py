"""Settings as dataclasses: checked on creation, read from YAML, and turned into flags.

Example:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Oven(Options):
    ...     degrees: float = option(180.0, "How hot.", above=0)
    >>> Oven(degrees=-3)
    Traceback (most recent call last):
    divqat._util.settings.ConfigError: degrees: wanted a number above 0, got -3
"""

from __future__ import annotations

import argparse
import math
import operator
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from divqat._util.bounds import MAX_SETTINGS, MAX_UNFOLDED, check_file, check_unfolded
from divqat._util.errors import require, unknown_name
from divqat._util.files import write_text
from divqat._util.foreign import FOREIGN, check_trusted, is_foreign

O = TypeVar("O", bound="Options")  # noqa: E741
NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


class ConfigError(ValueError):
    """A setting is unknown or has an invalid value."""


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: Iterable[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    empty: bool = False,
    foreign: bool = False,
) -> Any:
    """A dataclass field with help text, bounds, and the group of its flag.

    Args:
        default: the default value.
        help: help text of the flag.
        group: title of the group of flags.
        choices: the allowed values.
        least, above, most, below: bounds, inclusive (least, most) or exclusive (above, below).
        empty: a tuple may be ``()``.
        foreign: besides ``choices``, ``module:function`` is allowed.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    metadata: dict[str, Any] = {"help": help, "group": group, "bounds": given}
    metadata |= {"choices": tuple(choices), "empty": empty, "foreign": foreign}
    return field(default=default, metadata=metadata)


class Options:
    """Base of the dataclasses whose fields are :func:`option`.

    Fields are ``int``, ``float``, ``bool`` or ``str``, one of them ``| None``, or a
    ``tuple[..., ...]`` of one. Floats may be given as integers, or as strings like ``1e-3``, which
    YAML does not read as a number.

    Raises:
        ConfigError: a value has a wrong type or is outside its bounds; the message names the field.
    """

    def __post_init__(self) -> None:
        for name, (spec, kind, optional) in _specs(type(self)).items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            object.__setattr__(self, name, _checked(name, value, kind, spec))

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields."""
        return list(_specs(cls))

    @classmethod
    def from_dict(cls: type[O], data: Mapping[str, Any], *, where: str = "") -> O:
        """Create the settings from ``{field: value}`` of a file; ``where`` names it in errors.

        Raises:
            ConfigError: an unknown key (the message suggests the nearest known one), an invalid
                value, or untrusted code, see :func:`divqat.trust`.
        """
        check_keys(data, cls.names(), where=where)
        try:
            settings = cls(**data)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}" if where else str(error)) from None
        settings._check_trusted(where)
        return settings

    def _check_trusted(self, where: str) -> None:
        for name, (spec, _, _) in _specs(type(self)).items():
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                try:
                    check_trusted(item if spec.metadata["foreign"] else None)
                except ValueError as error:
                    raise ConfigError(f"{where}: {name}: {error}".removeprefix(": ")) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, with tuples as lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()  # type: ignore[call-overload]
        }


def check_keys(data: object, known: Iterable[str], *, where: str = "") -> None:
    """Check that ``data`` is a mapping whose keys are all ``known``; ConfigError if not."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'config'}: wanted 'key: value' lines, got {data!r}")
    known = list(known)
    for key in data:
        if key not in known:
            what = f"key in {where}" if where else "key"
            raise ConfigError(str(unknown_name(what, key, known)))


def add_flags(parser: argparse.ArgumentParser, cls: type[Options], *, skip: tuple = ()) -> None:
    """Add a flag for each field. A flag that is not given sets no attribute in the namespace."""
    groups: dict[str, Any] = {}
    for name, (spec, kind, _) in _specs(cls).items():
        if name in skip:
            continue
        title = spec.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        settings: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": _flag_help(spec).replace("%", "%%"),
        }
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            item = get_args(kind)[0] if get_origin(kind) is tuple else kind
            choices = spec.metadata["choices"]
            settings["type"] = item
            if spec.metadata["foreign"]:
                settings["metavar"] = f"{{{','.join((*choices, FOREIGN))}}}"
            elif choices:
                settings["choices"] = choices
            else:
                settings["metavar"] = name.split("_")[-1].upper()
            if item is not kind:
                settings["nargs"] = "*" if spec.metadata["empty"] else "+"
        groups[title].add_argument(f"--{name.replace('_', '-')}", **settings)


def _flag_help(spec: Field) -> str:
    """The help of a field's flag. A default of None is left out, as a flag cannot have it."""
    text, default = spec.metadata["help"], spec.default
    if default is None:
        return text.replace(". None:", ". If not given:").replace("None:", "if not given:")
    if isinstance(default, bool):
        default = f"--{'' if default else 'no-'}{spec.name.replace('_', '-')}"
    return f"{text} (default: {default})"


def given_flags(args: argparse.Namespace, cls: type[Options]) -> dict[str, Any]:
    """The flags of :func:`add_flags` that the user gave."""
    return {name: getattr(args, name) for name in _specs(cls) if hasattr(args, name)}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The differences between two settings, like ``lr: 0.1 -> 0.2``; nested keys are dotted."""
    lines = []
    for key in dict.fromkeys([*a, *b]):
        old, new = a.get(key), b.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{key}.{inner}" for inner in differences(old, new)]
        elif old != new:
            lines.append(f"{key}: {old} -> {new}")
    return lines


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: it is not YAML, not a mapping, or expands to a size that fills the memory.
        ImportError: PyYAML is missing.
    """
    yaml = require("yaml", "cli")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        check_file(path, MAX_SETTINGS)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    text = Path(path).read_bytes()
    try:
        loader = yaml.SafeLoader(text.decode())
        node = loader.get_single_node()
        check_unfolded(node, MAX_UNFOLDED * MAX_SETTINGS, _yaml_parts)
        data = None if node is None else loader.construct_document(node)
    except Exception as error:  # PyYAML may raise anything for odd input
        raise ConfigError(f"{path} is not YAML: {_yaml_problem(error, text)}") from error
    check_keys({} if data is None else data, data or (), where=str(path))
    return data or {}


def _yaml_parts(node: Any) -> tuple[int, list[Any]]:
    """See :func:`divqat._util.bounds.check_unfolded`; None stands for an empty file."""
    value = "" if node is None else node.value
    if isinstance(value, str):
        return 1 + len(value), []
    if node.id == "mapping":
        return 1, [part for pair in value for part in pair]
    return 1, value


def _yaml_problem(error: Any, text: bytes) -> str:
    """A description of the error, with the line of ``text`` if known."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {error.problem}"
    before = None
    if isinstance(error, UnicodeDecodeError):
        before = text[: error.start]
    elif hasattr(error, "position"):  # of a forbidden character
        before = text.decode()[: error.position].encode()
    line = "" if before is None else f"line {before.count(10) + 1}: "
    return line + " ".join(str(error).split())


def write_yaml(path: str | Path, data: Mapping[str, Any]) -> Path:
    """Write plain data as YAML, atomically."""
    yaml = require("yaml", "cli")
    return write_text(path, yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def _specs(cls: type[Options]) -> dict[str, tuple[Field, Any, bool]]:
    """The field, its type without ``None``, and whether None is allowed, by name."""
    hints = get_type_hints(cls)
    specs = {}
    for spec in fields(cls):  # type: ignore[arg-type]
        assert spec.default is not MISSING
        kind = hints[spec.name]
        optional = isinstance(kind, types.UnionType)
        specs[spec.name] = (spec, get_args(kind)[0] if optional else kind, optional)
    return specs


def _checked(name: str, value: Any, kind: Any, spec: Field) -> Any:
    if get_origin(kind) is tuple:
        empty = spec.metadata["empty"]
        if not isinstance(value, (list, tuple)) or not (value or empty):
            wanted = "a list" if empty else "a list of at least one value"
            raise ConfigError(f"{name}: wanted {wanted}, got {value!r}")
        return tuple(_checked(name, item, get_args(kind)[0], spec) for item in value)
    choices, bounds = spec.metadata["choices"], spec.metadata["bounds"]
    wanted = NOUNS[kind] + "".join(f" {word} {bound:g}" for word, bound in bounds.items())
    foreign = spec.metadata["foreign"]
    if choices:
        wanted = f"one of {', '.join(choices)}{f' or {FOREIGN}' if foreign else ''}"
    try:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and not fits and not isinstance(value, bool):
            value, fits = float(value), True
    except (TypeError, ValueError):
        fits = False
    if fits and kind is str:
        fits = bool(value)  # an empty path would be the current folder
    if fits and kind is float:
        fits = math.isfinite(value)
    inside = fits and all(BOUNDS[word](value, bound) for word, bound in bounds.items())
    known = not choices or value in choices or (foreign and is_foreign(value))
    if not inside or not known:
        raise ConfigError(f"{name}: wanted {wanted}, got {value!r}")
    return value
