"""The flags of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from divqat import __version__, data
from divqat._util.foreign import FOREIGN, is_foreign
from divqat._util.names import check_folder
from divqat._util.settings import add_flags
from divqat.cli import commands
from divqat.evaluate import Grid
from divqat.experiments.deploy import AttackConfig
from divqat.train import TrainConfig


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``command`` is the function, ``trust`` the code that it names."""
    parser = argparse.ArgumentParser(
        prog="divqat",
        description="Train int8 CNNs that are hard to copy, export them, and attack them.",
        epilog="Start with: divqat run --config configs/digits.yaml --out runs/digits",
    )
    parser.add_argument("--version", action="version", version=f"divqat {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for define in (_train, _export, _verify, _attack, _evaluate, _run, _study, _report, _info):
        define(subparsers)
    return parser


def _add(
    subparsers: Any,
    name: str,
    command: Callable[[argparse.Namespace], int],
    help: str,
    example: str,
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
    if command not in (commands.report, commands.info):
        sub.add_argument(
            "--trust",
            nargs="+",
            type=_code,
            default=[],
            metavar=FOREIGN.upper(),
            help="Import these, if a file or a run folder names them: they run as you.",
        )
    return sub


def _train(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "train",
        commands.train,
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


def _export(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "export",
        commands.export,
        "Write a trained model as int8 ONNX: RUN/model.onnx.",
        "divqat export runs/qat",
    )
    _run_arguments(sub)


def _verify(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "verify",
        commands.verify,
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


def _attack(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "attack",
        commands.attack,
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


def _evaluate(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "evaluate",
        commands.evaluate,
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


def _run(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "run",
        commands.study,
        "The whole job: train victims with every seed, export, verify and attack them, write a "
        "report. Started again, it goes on.",
        "divqat run --config configs/digits.yaml --out runs/digits --seeds 0 1 2",
    )
    sub.add_argument("--config", required=True, metavar="FILE", help="YAML file of the study.")
    _study_arguments(sub)


def _study(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "study",
        commands.study,
        "The same; victims, attacks, defenses and seeds can be added to what is finished.",
        "divqat study configs/attacks.yaml --out runs/attacks",
    )
    sub.add_argument("config", metavar="FILE", help="YAML file of the study.")
    _study_arguments(sub)


def _report(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "report",
        commands.report,
        "Write the report of a job, a study or an evaluation anew.",
        "divqat report runs/digits",
    )
    sub.add_argument("out", type=_folder, metavar="OUT", help="Folder of the job.")


def _info(subparsers: Any) -> None:
    sub = _add(
        subparsers,
        "info",
        commands.info,
        "Versions, devices, and which backend serves which op.",
        "divqat info",
    )
    sub.add_argument("--json", action="store_true", help="For programs.")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--jobs",
        type=_count,
        default=1,
        metavar="N",
        help="Trainings and attacks at a time, each in a process (default: 1). They share the "
        "CPU's threads.",
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="Train and attack on the workers of this dask scheduler, which see the folder of "
        "--out under the same path.",
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
