"""The command line: ``divqat train | export | verify | attack | evaluate | run | study ...``.

Exit codes: 0 done, 1 failed, 2 wrong usage (a flag, a key or a value), 130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from divqat._util.foreign import is_foreign, trust
from divqat._util.settings import ConfigError
from divqat._util.streams import lenient
from divqat._util.text import printable
from divqat.cli import commands
from divqat.cli.parser import build_parser
from divqat.train.distributed import launched

LONGEST = 2000  # characters of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what cannot be printed does not end it."""
    with lenient():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(arguments: list[str]) -> int:
    args = build_parser().parse_args(arguments)
    # A report is UTF-8, and a path need not be.
    command = shlex.join(["divqat", *arguments])
    args.command_line = command.encode(errors="backslashreplace").decode()
    process, processes = launched()
    where = f"divqat (process {process} of {processes})" if processes > 1 else "divqat"
    try:
        if processes > 1 and args.command is not commands.train:
            raise ConfigError("torchrun: of all commands, train alone runs in several processes")
        with trust(*_named(args)):
            return args.command(args)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_continue(args)}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"{where}: error: {_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _line(message: object) -> str:
    """An error, parts of which may come from a file, as a line of a terminal."""
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _named(args: argparse.Namespace) -> list[str]:
    """The code that this command line names: of ``--trust``, and what flags take for a network."""
    given = vars(args)
    names = [*given.get("trust", []), *given.get("clones", [])]
    names += [given[flag] for flag in ("model", "clone", "surrogate") if flag in given]
    return [name for name in names if is_foreign(name)]


def _how_to_continue(args: argparse.Namespace) -> str:
    if args.command is commands.train:
        code = "".join(f" --trust {name}" for name in _named(args))
        return f"to go on: divqat train --out {args.out} --resume{code}"
    return "the same command goes on from here"
