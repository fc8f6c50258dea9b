"""The commands and their flags; those about one model are in divqat.cli.models."""

from __future__ import annotations

import argparse
from typing import Any

from divqat import __version__, data
from divqat._util.settings import add_flags
from divqat.cli import commands, models
from divqat.cli.define import add_command
from divqat.cli.types import folder_path, positive_int
from divqat.evaluate import Grid
from divqat.experiments.deploy import AttackConfig


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
        models.train,
        models.export,
        models.verify,
        models.sensitivity,
        _attack,
        _evaluate,
        _run,
        _study,
        _report,
        models.ownership,
        _info,
    ):
        define(subparsers)
    return parser


def _attack(subparsers: Any) -> None:
    sub = add_command(
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
    sub = add_command(
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
        help="Run folder of a victim, or its file of ONNX, ExecuTorch (.pte) or OpenVINO (.xml); "
        "may be repeated. Run folders with the same name are the seeds of one victim.",
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
    sub = add_command(
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
    sub = add_command(
        subparsers,
        "study",
        commands.study,
        "The same as run; victims, attacks, defenses and seeds can be added to a finished study.",
        "divqat study configs/attacks.yaml --out runs/attacks",
    )
    sub.add_argument("config", metavar="FILE", help="YAML file of the study.")
    _study_arguments(sub)


def _report(subparsers: Any) -> None:
    sub = add_command(
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
    sub = add_command(
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
