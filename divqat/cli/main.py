"""The command line: ``divqat train | export | verify | attack | evaluate | run | study ...``.

Exit codes: 0 success, 1 failure, 2 usage error (a flag, key or value), 130 interrupted.
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
from divqat.train.distributed import rank_and_world_size

MAX_LENGTH = 2000  # of an error message, in characters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. What the terminal cannot encode is escaped."""
    with lenient():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(arguments: list[str]) -> int:
    args = build_parser().parse_args(arguments)
    # The report is UTF-8, but a path may not be.
    command = shlex.join(["divqat", *arguments])
    args.command_line = command.encode(errors="backslashreplace").decode()
    rank, world_size = rank_and_world_size()
    where = f"divqat (process {rank} of {world_size})" if world_size > 1 else "divqat"
    try:
        if world_size > 1 and args.command is not commands.train:
            raise ConfigError("torchrun: only divqat train runs in several processes")
        with trust(*_foreign_code(args)):
            return args.command(args)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_continue(args)}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"{where}: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _one_line(message: object) -> str:
    """An error as a single printable line, as parts of it may come from an untrusted file."""
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]} ..."


def _foreign_code(args: argparse.Namespace) -> list[str]:
    """The user's code that the command line names: with ``--trust`` or as a network."""
    given = vars(args)
    names = [*given.get("trust", []), *given.get("clones", [])]
    names += [given[flag] for flag in ("model", "clone", "surrogate") if flag in given]
    return [name for name in names if is_foreign(name)]


def _how_to_continue(args: argparse.Namespace) -> str:
    if args.command is commands.train:
        code = "".join(f" --trust {name}" for name in _foreign_code(args))
        return f"to resume: divqat train --out {args.out} --resume{code}"
    return "the same command resumes"
