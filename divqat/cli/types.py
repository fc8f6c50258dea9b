"""The types of flags. Each turns the text of a flag into its value; argparse reports an error."""

from __future__ import annotations

import argparse

from divqat._util.foreign import FOREIGN, is_foreign
from divqat._util.names import check_folder


def folder_path(text: str) -> str:
    """A path that may become a folder."""
    try:
        check_folder("folder", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("folder: ")) from None
    return text


def foreign_name(text: str) -> str:
    """``module:function``, code of the user."""
    if not is_foreign(text):
        raise argparse.ArgumentTypeError(f"wanted {FOREIGN}, got {text}")
    return text


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number at least 1, got {text}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text}")
    return value
