"""The commands about one model: train it, export it, look into it."""

from __future__ import annotations

from typing import Any

from divqat._util.settings import add_flags
from divqat.cli import commands
from divqat.cli.define import add_command, run_arguments
from divqat.cli.types import folder_path, fraction
from divqat.experiments.deploy import FILES, RUNTIMES
from divqat.experiments.sensitivity import SensitivityConfig
from divqat.ownership.check import ALPHA
from divqat.train import TrainConfig


def train(subparsers: Any) -> None:
    sub = add_command(
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


def export(subparsers: Any) -> None:
    sub = add_command(
        subparsers,
        "export",
        commands.export,
        "Export a trained model as an int8 file: RUN/model.onnx, or the file of another runtime.",
        "divqat export runs/qat",
    )
    run_arguments(sub)
    sub.add_argument(
        "--to", choices=list(FILES), default="onnx",
        help="executorch: RUN/model.pte, for phones, in XNNPACK; openvino: RUN/model.xml and "
        "model.bin, for Intel's runtime (default: onnx).",
    )  # fmt: skip
    sub.add_argument(
        "--normalize-inside",
        action="store_true",
        help="The ONNX file takes uint8 pictures and normalizes them itself.",
    )
    sub.add_argument(
        "--opset", type=int, choices=range(13, 22), metavar="13..21",
        help="Opset of the ONNX file (default: 20, or 21 with --pack-int4).",
    )  # fmt: skip
    sub.add_argument(
        "--pack-int4",
        action="store_true",
        help="Store weights of at most 4 bits as INT4 in the ONNX file; ONNX Runtime computes "
        "them in float.",
    )


def verify(subparsers: Any) -> None:
    sub = add_command(
        subparsers,
        "verify",
        commands.verify,
        "Compare the exported model with the trained one on the whole test set.",
        "divqat verify runs/qat",
    )
    run_arguments(sub)
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


def sensitivity(subparsers: Any) -> None:
    sub = add_command(
        subparsers,
        "sensitivity",
        commands.sensitivity,
        "Measure what the quantization of each layer costs, on the validation images.",
        "divqat sensitivity runs/qat --mixed-precision 4",
    )
    run_arguments(sub)
    add_flags(sub, SensitivityConfig)


def ownership(subparsers: Any) -> None:
    sub = add_command(
        subparsers,
        "ownership",
        commands.ownership,
        "Test whether a suspect model was copied from the model of a run, by the decoy that it "
        "would have learned.",
        "divqat ownership suspect.onnx --secret runs/divqat --answer label",
    )
    sub.add_argument(
        "suspect",
        type=folder_path,
        metavar="SUSPECT",
        help="Run folder, whose model is asked as trained, or a file of ONNX, ExecuTorch (.pte) or "
        "OpenVINO (.xml).",
    )
    sub.add_argument(
        "--secret",
        type=folder_path,
        required=True,
        metavar="RUN",
        help="Run folder of the defended model, with misdirect and misdirect_target decoy.",
    )
    sub.add_argument(
        "--answer",
        default="probs",
        metavar="WHAT",
        help="What the suspect returns: probs, label, top<k> or rounded<decimals> (default: "
        "probs).",
    )
    sub.add_argument(
        "--nonce", metavar="HEX", help="Of the queries, from a judge; default: a new one."
    )
    sub.add_argument(
        "--alpha",
        type=fraction,
        default=ALPHA,
        metavar="RATE",
        help=f"The false-alarm rate, over keys, at least 4e-4 (default: {ALPHA:g}).",
    )
    sub.add_argument(
        "--data-root", type=folder_path, metavar="DIR", help="Folder of the run's data set."
    )
    sub.add_argument(
        "--out", type=folder_path, metavar="DIR", help="Default: RUN/ownership-SUSPECT."
    )
