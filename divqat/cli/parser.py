"""The commands and their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from divqat import __version__, data
from divqat._util.foreign import FOREIGN
from divqat._util.settings import add_flags
from divqat.cli import commands
from divqat.cli.types import folder_path, foreign_name, fraction, positive_int
from divqat.evaluate import Grid
from divqat.experiments.deploy import FILES, RUNTIMES, AttackConfig
from divqat.experiments.sensitivity import SensitivityConfig
from divqat.train import TrainConfig


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``command`` is set to a function of divqat.cli.commands."""
    parser = argparse.ArgumentParser(
        prog="divqat",
        description="Train int8 CNNs that are hard to copy, export and attack them.",
        epilog="Start with: divqat run --config configs/digits.yaml --out runs/digits",
    )
    parser.add_argument("--version", action="version", version=f"divqat {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for define in (
        _train,
        _export,
        _verify,
        _sensitivity,
        _attack,
        _evaluate,
        _run,
        _study,
        _report,
        _info,
    ):
        define(subparsers)
    return parser


def _add_command(
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


def _train(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "train",
        commands.train,
        "Train a model into a run folder. The same command resumes after the last epoch.",
        "divqat train --dataset digits --out runs/fp\n"
        "         divqat train --method divqat --teacher runs/fp --lr 0.005 --out runs/divqat",
    )
    sub.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="The run folder."
    )
    sub.add_argument("--config", metavar="FILE", help="YAML file with settings; flags override it.")
    sub.add_argument(
        "--resume", action="store_true", help="Resume with the settings in the run folder."
    )
    add_flags(sub, TrainConfig)


def _export(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "export",
        commands.export,
        "Export a trained model as an int8 file: RUN/model.onnx, or RUN/model.pte.",
        "divqat export runs/qat",
    )
    _run_arguments(sub)
    sub.add_argument(
        "--to", choices=list(FILES), default="onnx",
        help="executorch: for phones, in XNNPACK (default: onnx).",
    )  # fmt: skip


def _verify(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "verify",
        commands.verify,
        "Compare the exported model with the trained one on the whole test set.",
        "divqat verify runs/qat",
    )
    _run_arguments(sub)
    sub.add_argument(
        "--runtime", choices=list(RUNTIMES), default="onnxruntime",
        help="What runs the exported file (default: onnxruntime).",
    )  # fmt: skip
    sub.add_argument(
        "--min-agreement",
        type=fraction,
        default=0.995,
        metavar="FRACTION",
        help="Fail if a smaller fraction of images gets the same class (default: 0.995).",
    )


def _sensitivity(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "sensitivity",
        commands.sensitivity,
        "Measure what the quantization of each layer costs, on the validation images.",
        "divqat sensitivity runs/qat --mixed-precision 4",
    )
    _run_arguments(sub)
    add_flags(sub, SensitivityConfig)


def _attack(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "attack",
        commands.attack,
        "Extract a trained model with KnockoffNets: query it, train a clone on its answers.",
        "divqat attack --victim runs/qat --answer label --query-set photos --budget 5000",
    )
    sub.add_argument("--config", metavar="FILE", help="YAML file with settings; flags override it.")
    sub.add_argument(
        "--victim",
        type=folder_path,
        required=True,
        metavar="RUN",
        help="Run folder of the victim.",
    )
    sub.add_argument(
        "--answer",
        default="probs",
        metavar="WHAT",
        help="What the victim returns: probs, label, top<k> or rounded<decimals> (default: probs).",
    )
    sub.add_argument("--out", type=folder_path, metavar="DIR", help="Default: RUN/attack-WHAT.")
    sub.add_argument(
        "--data-root", type=folder_path, metavar="DIR", help="Folder of the victim's data set."
    )
    sub.add_argument(
        "--fake-quant",
        action="store_true",
        help="Attack the fake-quantized model instead of RUN/model.onnx.",
    )
    add_flags(sub, AttackConfig)


def _evaluate(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "evaluate",
        commands.evaluate,
        "Measure how extractable victims are: attack them behind each defense with every seed, and "
        "write a report. The same command resumes.",
        "divqat evaluate --victim runs/qat --victim runs/divqat --attacks knockoff "
        "knockoff:reading=label jbda\n         --defenses none reverse-sigmoid:l1=0.5 --seeds 3 "
        "--out runs/evaluation",
    )
    sub.add_argument("--config", metavar="FILE", help="YAML file with settings; flags override it.")
    sub.add_argument(
        "--victim",
        required=True,
        action="append",
        metavar="[NAME=]PATH",
        help="Run folder, ONNX or ExecuTorch file (.pte) of a victim; may be repeated. Run folders "
        "with the same name are the seeds of one victim.",
    )
    sub.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="Folder for everything."
    )
    sub.add_argument(
        "--dataset",
        choices=data.names(),
        help="The victims' data set, if no run folder names it.",
    )
    sub.add_argument(
        "--data-root", type=folder_path, metavar="DIR", help="Folder of the victims' data set."
    )
    sub.add_argument(
        "--fake-quant",
        action="store_true",
        help="Attack the fake-quantized models instead of their int8 exports.",
    )
    add_flags(sub, Grid)


def _run(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "run",
        commands.study,
        "Run a study: train victims with every seed, export, verify and attack them, write a "
        "report. The same command resumes.",
        "divqat run --config configs/digits.yaml --out runs/digits --seeds 0 1 2",
    )
    sub.add_argument("--config", required=True, metavar="FILE", help="YAML file of the study.")
    _study_arguments(sub)


def _study(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "study",
        commands.study,
        "The same as run; victims, attacks, defenses and seeds can be added to a finished study.",
        "divqat study configs/attacks.yaml --out runs/attacks",
    )
    sub.add_argument("config", metavar="FILE", help="YAML file of the study.")
    _study_arguments(sub)


def _report(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "report",
        commands.report,
        "Rewrite the report of a study or an evaluation.",
        "divqat report runs/digits",
    )
    sub.add_argument(
        "out", type=folder_path, metavar="OUT", help="Folder of the study or evaluation."
    )


def _info(subparsers: Any) -> None:
    sub = _add_command(
        subparsers,
        "info",
        commands.info,
        "Show versions, devices, and the backend of each op.",
        "divqat info",
    )
    sub.add_argument("--json", action="store_true", help="Print JSON.")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="Folder for everything."
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="Override the file's seeds."
    )
    parser.add_argument(
        "--data-root", type=folder_path, metavar="DIR", help="Override common.data_root."
    )
    parser.add_argument(
        "--query-root", type=folder_path, metavar="DIR", help="Override the attacks' query_root."
    )
    parser.add_argument(
        "--device", metavar="NAME", help="Override common.device and the device of the attacks."
    )
    parser.add_argument(
        "--jobs", type=positive_int, default=1, metavar="N",
        help="Number of trainings and attacks at a time, each in its own process (default: 1). "
        "They share the CPU threads.",
    )  # fmt: skip
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="Train and attack on the workers of this dask scheduler, which have to see --out "
        "under the same path.",
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=folder_path, metavar="RUN", help="Run folder of a quantized training."
    )
    parser.add_argument(
        "--data-root", type=folder_path, metavar="DIR", help="Folder of the run's data set."
    )
