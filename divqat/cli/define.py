"""What the definitions of several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from divqat._util.foreign import FOREIGN
from divqat.cli import commands
from divqat.cli.types import folder_path, foreign_name


def add_command(
    subparsers: Any,
    name: str,
    command: Callable[[argparse.Namespace], int],
    help: str,
    example: str,
) -> argparse.ArgumentParser:
    """A command with its help, an example, and the flags that every command has."""
    sub = subparsers.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a new flag must not make an abbreviation in a script ambiguous
    )
    sub.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    sub.set_defaults(command=command)
    if command not in (commands.report, commands.info):
        sub.add_argument(
            "--trust",
            nargs="+",
            type=foreign_name,
            default=[],
            metavar=FOREIGN.upper(),
            help="Import this code if a file or run folder names it. It runs with your rights.",
        )
    return sub


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command about one run folder."""
    parser.add_argument(
        "run", type=folder_path, metavar="RUN", help="Run folder of a quantized training."
    )
    parser.add_argument(
        "--data-root", type=folder_path, metavar="DIR", help="Folder of the run's data set."
    )
