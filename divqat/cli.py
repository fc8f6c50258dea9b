"""The command line: ``divqat train | export | verify | attack | run | report | info``.

Exit codes: 0 done, 1 failed, 2 wrong usage (a flag, a key or a value), 130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from divqat import __version__, data
from divqat import commands as run
from divqat.evaluate.grid import Grid
from divqat.foreign import FOREIGN, is_foreign, trust
from divqat.names import check_folder
from divqat.options import ConfigError, add_flags
from divqat.steps import AttackConfig
from divqat.streams import lenient
from divqat.text import printable
from divqat.train import TrainConfig
from divqat.train.distributed import launched

LONGEST = 2000  # characters of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what cannot be printed does not end it."""
    with lenient():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    # A report is UTF-8, and a path need not be.
    command = shlex.join(["divqat", *arguments])
    args.command_line = command.encode(errors="backslashreplace").decode()
    process, processes = launched()
    where = f"divqat (process {process} of {processes})" if processes > 1 else "divqat"
    try:
        if processes > 1 and args.command is not run.train:
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
    if args.command is run.train:
        code = "".join(f" --trust {name}" for name in _named(args))
        return f"to go on: divqat train --out {args.out} --resume{code}"
    return "the same command goes on from here"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="divqat",
        description="Train int8 CNNs that are hard to copy, export them, and attack them.",
        epilog="Start with: divqat run --config configs/digits.yaml --out runs/digits",
    )
    parser.add_argument("--version", action="version", version=f"divqat {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], help: str, example: str
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a flag that comes later must not change what a script means
        )
        sub.add_argument("--debug", action="store_true", help="Show where an error comes from.")
        sub.set_defaults(command=command)
        if command not in (run.report, run.info):
            sub.add_argument(
                "--trust",
                nargs="+",
                type=_code,
                default=[],
                metavar=FOREIGN.upper(),
                help="Import these, if a file or a run folder names them: they run as you.",
            )
        return sub

    sub = add(
        "train",
        run.train,
        "Train a model into a run folder; started again, it goes on after the last epoch.",
        "divqat train --dataset digits --out runs/fp\n"
        "         divqat train --method divqat --teacher runs/fp --lr 0.005 --out runs/divqat",
    )
    sub.add_argument("--out", type=_folder, required=True, metavar="DIR", help="The run folder.")
    sub.add_argument("--config", metavar="FILE", help="YAML with settings; flags override it.")
    sub.add_argument(
        "--resume", action="store_true", help="Take all settings from the run folder and go on."
    )
    add_flags(sub, TrainConfig)

    sub = add(
        "export",
        run.export,
        "Write a trained model as int8 ONNX: RUN/model.onnx.",
        "divqat export runs/qat",
    )
    _run_arguments(sub)
    sub = add(
        "verify",
        run.verify,
        "Compare the exported model with the trained one on the whole test set.",
        "divqat verify runs/qat",
    )
    _run_arguments(sub)
    sub.add_argument(
        "--min-agreement",
        type=_share,
        default=0.995,
        metavar="SHARE",
        help="Fail if fewer images get the same class (default: 0.995).",
    )

    sub = add(
        "attack",
        run.attack,
        "Extract a trained model with KnockoffNets: ask it, train a clone on its answers.",
        "divqat attack --victim runs/qat --answer label --query-set photos --budget 5000",
    )
    sub.add_argument("--config", metavar="FILE", help="YAML with settings; flags override it.")
    sub.add_argument(
        "--victim", type=_folder, required=True, metavar="RUN", help="Run folder of the victim."
    )
    sub.add_argument(
        "--answer",
        default="probs",
        metavar="WHAT",
        help="What the victim shows: probs, label, top<k> or rounded<decimals> (default: probs).",
    )
    sub.add_argument("--out", type=_folder, metavar="DIR", help="Default: RUN/attack-WHAT.")
    sub.add_argument(
        "--data-root", type=_folder, metavar="DIR", help="Folder of the victim's data set."
    )
    sub.add_argument(
        "--fake-quant",
        action="store_true",
        help="Attack the model as it was trained instead of RUN/model.onnx.",
    )
    add_flags(sub, AttackConfig)

    sub = add(
        "evaluate",
        run.evaluate,
        "How extractable: attack victims in many ways, behind defenses, with every seed, and write "
        "a report. Started again, it goes on.",
        "divqat evaluate --victim runs/qat --victim runs/divqat --attacks knockoff "
        "knockoff:reading=label jbda\n         --defenses none reverse-sigmoid:l1=0.5 --seeds 3 "
        "--out runs/evaluation",
    )
    sub.add_argument("--config", metavar="FILE", help="YAML with settings; flags override it.")
    sub.add_argument(
        "--victim",
        required=True,
        action="append",
        metavar="[NAME=]PATH",
        help="Run folder or ONNX file of a victim; may be given several times. Run folders of one "
        "name are the seeds of one victim.",
    )
    sub.add_argument(
        "--out", type=_folder, required=True, metavar="DIR", help="Folder for everything."
    )
    sub.add_argument(
        "--dataset",
        choices=data.names(),
        help="What the victims learned, where no run folder tells.",
    )
    sub.add_argument(
        "--data-root", type=_folder, metavar="DIR", help="Folder of the victims' data set."
    )
    sub.add_argument(
        "--fake-quant",
        action="store_true",
        help="Attack runs as they were trained instead of exported to int8.",
    )
    add_flags(sub, Grid)

    sub = add(
        "run",
        run.run,
        "The whole job: train, export, verify, attack every victim, write a report. "
        "Started again, it goes on.",
        "divqat run --config configs/digits.yaml --out runs/digits --seeds 0 1 2",
    )
    sub.add_argument("--config", required=True, metavar="FILE", help="YAML file of the job.")
    _job_arguments(sub)
    sub = add(
        "study",
        run.study,
        "Train victims with every seed, deploy them, and evaluate them all. Started again, it goes "
        "on; victims, attacks, defenses and seeds can be added.",
        "divqat study configs/attacks.yaml --out runs/attacks",
    )
    sub.add_argument("config", metavar="FILE", help="YAML file of the study.")
    _job_arguments(sub)
    sub.add_argument(
        "--jobs",
        type=_count,
        default=1,
        metavar="N",
        help="Seeds at a time, each in a process (default: 1). They share the CPU's threads.",
    )

    sub = add(
        "report",
        run.report,
        "Write the report of a job, a study or an evaluation anew.",
        "divqat report runs/digits",
    )
    sub.add_argument("out", type=_folder, metavar="OUT", help="Folder of the job.")
    sub = add(
        "info",
        run.info,
        "Versions, devices, and which backend serves which op.",
        "divqat info",
    )
    sub.add_argument("--json", action="store_true", help="For programs.")
    return parser


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=_folder, required=True, metavar="DIR", help="Folder for everything."
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="Override the file's seeds."
    )
    parser.add_argument(
        "--data-root", type=_folder, metavar="DIR", help="Override common.data_root."
    )
    parser.add_argument(
        "--device", metavar="NAME", help="Override common.device, and the attacks'."
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=_folder, metavar="RUN", help="Run folder of a quantized training."
    )
    parser.add_argument(
        "--data-root", type=_folder, metavar="DIR", help="Folder of the run's data set."
    )


def _folder(text: str) -> str:
    try:
        check_folder("folder", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("folder: ")) from None
    return text


def _code(text: str) -> str:
    if not is_foreign(text):
        raise argparse.ArgumentTypeError(f"wanted {FOREIGN}, got {text}")
    return text


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number at least 1, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text}")
    return value
