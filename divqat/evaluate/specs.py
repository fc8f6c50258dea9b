"""Attacks and defenses as text: ``name`` or ``name:setting=value,setting=value``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from divqat._util.errors import unknown_name
from divqat._util.settings import ConfigError, check_keys
from divqat.attacks import ATTACKS, Attack
from divqat.attacks.controlled import SemiSupervised
from divqat.attacks.training import TransferAttack
from divqat.defenses import DEFENSES, Defense

UNDEFENDED = "none"
VICTIM = "victim"  # the setting that turns an attack into its control
LABELS_ALONE = "labeled-only"
CONTROL = "shuffled"  # a value of ``reading``, see divqat.attacks.answers
COMMON = {"query_budget", "seed", "precision", "pad", "flip"}  # defaults that any attack may take
WORDS = {"true": True, "false": False, "none": None}


def split_spec(text: str) -> tuple[str, dict[str, Any]]:
    """``"jbda:rounds=4,flip=true"`` as ``("jbda", {"rounds": 4, "flip": True})``.

    Raises:
        ConfigError: a part is not ``setting=value``, or a setting is given twice.
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
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def is_control(text: str) -> bool:
    """Whether an attack is the control that learns from answers to other images."""
    return split_spec(text)[1].get("reading") == CONTROL


def steals(text: str) -> bool:
    """Whether an attack takes anything from the victim: controls and attacks without queries do
    not.

    Raises:
        ConfigError: an unknown attack.
    """
    return (
        _attack_class(text).asks
        and not is_control(text)
        and split_spec(text)[1].get(VICTIM, True) is not False
    )


def control_of(text: str, attacks: Iterable[str]) -> str | None:
    """The control that shows what an attack with labeled images owes to them: among ``attacks`` the
    same one without the victim, else the labels alone; None if there is none.

    An attack that also learns from the query set as it is has only the first.

    Raises:
        ConfigError: an unknown attack.
    """
    if not (steals(text) and owns(text)):
        return None
    name, settings = split_spec(text)
    alone = name, {**settings, VICTIM: False}
    found = {other: split_spec(other) for other in attacks}
    same = [other for other, spec in found.items() if spec == alone]
    if not issubclass(_attack_class(text), SemiSupervised):
        same += [other for other, (kind, _) in found.items() if kind == LABELS_ALONE]
    return next(iter(same), None)


def without_victim(text: str) -> str:
    """The spec of an attack's control: its own, or that of the labels alone.

    Raises:
        ConfigError: an unknown attack.
    """
    if not issubclass(_attack_class(text), SemiSupervised):
        return LABELS_ALONE
    return f"{text}{',' if ':' in text else ':'}{VICTIM}=false"


def owns(text: str) -> bool:
    """Whether an attack starts from images of the victim's kind that the attacker owns.

    Raises:
        ConfigError: see :func:`make_attack`.
    """
    return make_attack(text, {}).owns


def is_alone(text: str) -> bool:
    """Whether an attack learns labeled images and takes nothing from the victim.

    Raises:
        ConfigError: see :func:`make_attack`.
    """
    return owns(text) and not steals(text) and not is_control(text)


def make_attack(text: str, defaults: Mapping[str, Any]) -> Attack:
    """The attack that ``text`` names.

    Args:
        text: its spec.
        defaults: values for the settings that the spec leaves out. Only attacks that train a clone
            on the answers to a transfer set take the settings of that training (epochs, learning
            rate ...); the others keep their own defaults.

    Raises:
        ConfigError: an unknown attack or setting, or a bad value.
    """
    attack, settings = _attack_class(text), split_spec(text)[1]
    check_keys(settings, attack.names(), where=text)
    learns_answers = issubclass(attack, TransferAttack) and attack.asks
    taken = defaults if learns_answers else set(defaults) & COMMON & set(attack.names())
    return attack.from_dict({**{key: defaults[key] for key in taken}, **settings}, where=text)


def _attack_class(text: str) -> type[Attack]:
    name = split_spec(text)[0]
    if name not in ATTACKS:
        raise ConfigError(str(unknown_name("attack", name, ATTACKS)))
    return ATTACKS[name]


def make_defense(text: str) -> tuple[Defense | None, float | None]:
    """The defense that ``text`` names (None for ``none``), and its ``l1`` (None if not given).

    Besides the defense's own settings a spec takes ``l1``: the strength is then chosen so that the
    mean L1 distance between clean and released answers to the query set is ``l1``.

    Raises:
        ConfigError: an unknown defense or setting, a bad value, or ``l1`` for a defense whose
            strength is given or that has none.
    """
    name, settings = split_spec(text)
    if name == UNDEFENDED and not settings:
        return None, None
    if name not in DEFENSES:
        raise ConfigError(str(unknown_name("defense", name, [UNDEFENDED, *DEFENSES])))
    defense = DEFENSES[name]
    l1 = settings.pop("l1", None)
    check_keys(settings, defense.names(), where=text)
    if l1 is not None and not (isinstance(l1, (int, float)) and 0 < l1 < 2):
        raise ConfigError(f"{text}: l1: wanted a number between 0 and 2, got {l1!r}")
    if l1 is not None and (defense.strength is None or defense.strength in settings):
        raise ConfigError(
            f"{text}: l1: {name} has no strength to choose"
            if defense.strength is None
            else f"{text}: l1: wanted it or {defense.strength}, not both"
        )
    return defense.from_dict(settings, where=text), l1
