"""Attacks and defenses as text: ``name`` or ``name:setting=value,setting=value``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from divqat._util.errors import unknown_name
from divqat._util.settings import ConfigError, check_keys
from divqat.attacks import ATTACKS, Attack
from divqat.attacks.training import TransferAttack
from divqat.defenses import DEFENSES, Defense

UNDEFENDED = "none"
CONTROL = "shuffled"  # a reading of answers, see divqat.attacks.answers
FOR_ALL = {"query_budget", "seed", "precision", "pad", "flip"}
WORDS = {"true": True, "false": False, "none": None}


def split_spec(text: str) -> tuple[str, dict[str, Any]]:
    """``"jbda:rounds=4,flip=true"`` as ``("jbda", {"rounds": 4, "flip": True})``.

    Raises:
        ConfigError: a part is no ``setting=value``, or a setting comes twice.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key or not value or key in settings:
            raise ConfigError(f"wanted name:setting=value,setting=value, got {text!r}")
        settings[key] = _value(value)
    return name, settings


def _value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def is_control(text: str) -> bool:
    """Whether an attack learns from answers to other images."""
    return split_spec(text)[1].get("reading") == CONTROL


def steals(text: str) -> bool:
    """Whether an attack's clone owes anything to the victim: a control's does not, nor does that of
    an attack which asks nothing.

    Raises:
        ConfigError: an unknown attack.
    """
    return _kind(text).asks and not is_control(text)


def owns(text: str) -> bool:
    """Whether an attack starts from images of the victim's kind that the attacker owns.

    Raises:
        ConfigError: see :func:`make_attack`.
    """
    return make_attack(text, {}).owns


def make_attack(text: str, defaults: Mapping[str, Any]) -> Attack:
    """The attack that ``text`` names.

    Args:
        text: its spec.
        defaults: what the spec leaves out. How a clone trains (epochs, learning rate ...) is taken
            by the attacks that train it on answers to a transfer set; the others have their own
            way.

    Raises:
        ConfigError: an unknown attack or setting, or a bad value.
    """
    kind, settings = _kind(text), split_spec(text)[1]
    check_keys(settings, kind.names(), where=text)
    learns_answers = issubclass(kind, TransferAttack) and kind.asks
    taken = defaults if learns_answers else set(defaults) & FOR_ALL & set(kind.names())
    usual = {key: defaults[key] for key in taken}
    return kind.from_dict({**usual, **settings}, where=text)


def _kind(text: str) -> type[Attack]:
    name = split_spec(text)[0]
    if name not in ATTACKS:
        raise ConfigError(str(unknown_name("attack", name, ATTACKS)))
    return ATTACKS[name]


def make_defense(text: str) -> tuple[Defense | None, float | None]:
    """The defense that ``text`` names, and the L1 distance that it is to be set to.

    ``none`` is None. Beside the defense's own settings a spec takes ``l1``: the mean L1 distance
    between clean and released answers to the query set that its strength is chosen for.

    Raises:
        ConfigError: an unknown defense or setting, a bad value, or ``l1`` where nothing decides it.
    """
    name, settings = split_spec(text)
    if name == UNDEFENDED and not settings:
        return None, None
    if name not in DEFENSES:
        raise ConfigError(str(unknown_name("defense", name, [UNDEFENDED, *DEFENSES])))
    kind = DEFENSES[name]
    l1 = settings.pop("l1", None)
    check_keys(settings, kind.names(), where=text)
    if l1 is not None and not (isinstance(l1, (int, float)) and 0 < l1 < 2):
        raise ConfigError(f"{text}: l1: wanted a number between 0 and 2, got {l1!r}")
    if l1 is not None and (kind.strength is None or kind.strength in settings):
        raise ConfigError(
            f"{text}: l1: {name} has no strength to choose"
            if kind.strength is None
            else f"{text}: l1: wanted it or {kind.strength}, not both"
        )
    return kind.from_dict(settings, where=text), l1
