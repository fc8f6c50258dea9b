"""The command line: ``divqat train | export | verify | attack | run | report | info``.

Exit codes: 0 done, 1 failed, 2 wrong usage (a flag, a key or a value), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from divqat import __version__
from divqat.job import Job
from divqat.options import ConfigError, add_flags, given_flags, read_yaml
from divqat.pipeline import run_job
from divqat.steps import AttackConfig, answer_arguments, attack_run, export_run, verify_run
from divqat.train import TrainConfig, load_run, train
from divqat.train.config import SHARED
from divqat.train.distributed import launched
from divqat.train.folder import read_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(arguments)
    args.command_line = shlex.join(["divqat", *arguments])
    process, processes = launched()
    where = f"divqat (process {process} of {processes})" if processes > 1 else "divqat"
    try:
        if processes > 1 and args.command is not _train:
            raise ConfigError("torchrun: of all commands, train alone runs in several processes")
        return args.command(args)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_continue(args)}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"{where}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _how_to_continue(args: argparse.Namespace) -> str:
    if args.command is _train:
        return f"to go on: divqat train --out {args.out} --resume"
    return "the same command goes on from here"


def _train(args: argparse.Namespace) -> int:
    train(_train_config(args), args.out)
    return 0


def _train_config(args: argparse.Namespace) -> TrainConfig:
    """Defaults, then what a teacher shares, then ``--config``, then flags. With ``--resume`` the
    run folder's own settings take the place of the first three."""
    flags = given_flags(args, TrainConfig)
    if args.resume:
        if args.config is not None:
            raise ConfigError("--resume takes the settings of the run folder: leave out --config")
        return TrainConfig.from_dict({**read_checkpoint(Path(args.out))["config"], **flags})
    file = {} if args.config is None else read_yaml(args.config)
    given = {**file, **flags}
    # Before a teacher is looked for: a misspelt key is the more likely mistake.
    config = TrainConfig.from_dict(given, where=args.config or "")
    if config.teacher is None:
        return config
    teacher = load_run(config.teacher).config
    return TrainConfig.from_dict({**{name: getattr(teacher, name) for name in SHARED}, **given})


def _export(args: argparse.Namespace) -> int:
    run = load_run(args.run)
    print(export_run(run, run.splits(args.data_root))["text"])
    return 0


def _verify(args: argparse.Namespace) -> int:
    run = load_run(args.run)
    report = verify_run(run, run.splits(args.data_root))
    print(report["text"])
    if report["argmax_agreement"] < args.min_agreement:
        print(
            f"divqat: error: agreement {report['argmax_agreement']:.4f} is below "
            f"{args.min_agreement}",
            file=sys.stderr,
        )
        return 1
    return 0


def _attack(args: argparse.Namespace) -> int:
    answer_arguments(args.answer)
    file = {} if args.config is None else read_yaml(args.config)
    given = {**file, **given_flags(args, AttackConfig)}
    config = AttackConfig.from_dict(given, where=args.config or "")
    run = load_run(args.victim)
    out = Path(args.out or run.folder / f"attack-{args.answer}")
    found = attack_run(
        run, run.splits(args.data_root), config, args.answer, out, fake_quant=args.fake_quant
    )
    kind = "the model as trained" if args.fake_quant else "the exported int8 model"
    print(f"victim           {run.folder}: {kind}, accuracy {found['victim_accuracy']:.2%}")
    print(f"queries          {found['queries']} of {config.query_set}, answers {args.answer}")
    print(f"clone accuracy   {found['accuracy']:.2%}")
    print(f"clone fidelity   {found['fidelity']:.2%} (same class as the victim)")
    print(f"written to       {out}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from divqat.evaluate import results_table

    data = read_yaml(args.config)
    if args.seeds is not None:
        data["seeds"] = args.seeds
    for flag in ("data_root", "device"):
        if getattr(args, flag) is not None:
            data["common"] = {**(data.get("common") or {}), flag: getattr(args, flag)}
    result = run_job(Job.from_dict(data), args.out, command=args.command_line)
    print(f"\n{results_table(result)}\n\n{Path(args.out) / 'report.html'}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from divqat.evaluate import write_report

    print(write_report(args.out))
    return 0


def _info(args: argparse.Namespace) -> int:
    info = _collect_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    for key in ("package", "devices", "hardware"):
        print(f"{key:<12}{info[key] if isinstance(info[key], str) else ', '.join(info[key])}")
    for name, version in info["versions"].items():
        print(f"{name:<12}{version}")
    print("\nnative kernels")
    for device, line in info["native_kernels"].items():
        print(f"  {device:<6}{line}")
    print("\nbackends of the ops")
    for name, devices in info["backends"].items():
        for device, (backend, reason) in devices.items():
            print(f"  {name:<32}{device:<6}{backend:<10}{reason}".rstrip())
    return 0


def _collect_info() -> dict[str, Any]:
    import torch

    from divqat.evaluate.result import hardware, versions
    from divqat.ops import backends, native_kernels

    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    missing = {"triton", "onnx", "onnxruntime"} - versions().keys()
    return {
        "package": str(Path(__file__).parent),
        "devices": ["cpu", *gpus],
        "hardware": hardware(),
        "cpu_threads": torch.get_num_threads(),
        "versions": versions() | dict.fromkeys(sorted(missing), "not installed"),
        "native_kernels": native_kernels(),
        "backends": backends(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="divqat",
        description="Train int8 CNNs that are hard to copy, export them, and attack them.",
        epilog="Start with: divqat run --config configs/digits.yaml --out runs/digits",
    )
    parser.add_argument("--version", action="version", version=f"divqat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], help: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a flag that comes later must not change what a script means
        )
        sub.add_argument("--debug", action="store_true", help="Show where an error comes from.")
        sub.set_defaults(command=command)
        return sub

    sub = add(
        "train",
        _train,
        "Train a model into a run folder; started again, it goes on after the last epoch.",
        "divqat train --dataset digits --out runs/fp\n"
        "         divqat train --method divqat --teacher runs/fp --lr 0.005 --out runs/divqat",
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="The run folder.")
    sub.add_argument("--config", metavar="FILE", help="YAML with settings; flags override it.")
    sub.add_argument(
        "--resume", action="store_true", help="Take all settings from the run folder and go on."
    )
    add_flags(sub, TrainConfig)

    sub = add(
        "export",
        _export,
        "Write a trained model as int8 ONNX: RUN/model.onnx.",
        "divqat export runs/qat",
    )
    _run_arguments(sub)
    sub = add(
        "verify",
        _verify,
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
        _attack,
        "Extract a trained model with KnockoffNets: ask it, train a clone on its answers.",
        "divqat attack --victim runs/qat --answer label --query-set photos --budget 5000",
    )
    sub.add_argument("--config", metavar="FILE", help="YAML with settings; flags override it.")
    sub.add_argument("--victim", required=True, metavar="RUN", help="Run folder of the victim.")
    sub.add_argument(
        "--answer",
        default="probs",
        metavar="WHAT",
        help="What the victim shows: probs, label, top<k> or rounded<decimals> (default: probs).",
    )
    sub.add_argument("--out", metavar="DIR", help="Default: RUN/attack-WHAT.")
    sub.add_argument("--data-root", metavar="DIR", help="Folder of the victim's data set.")
    sub.add_argument(
        "--fake-quant",
        action="store_true",
        help="Attack the model as it was trained instead of RUN/model.onnx.",
    )
    add_flags(sub, AttackConfig)

    sub = add(
        "run",
        _run,
        "The whole job: train, export, verify, attack every victim, write a report. "
        "Started again, it goes on.",
        "divqat run --config configs/digits.yaml --out runs/digits --seeds 0 1 2",
    )
    sub.add_argument("--config", required=True, metavar="FILE", help="YAML file of the job.")
    sub.add_argument("--out", required=True, metavar="DIR", help="Folder for everything.")
    sub.add_argument("--seeds", type=int, nargs="+", metavar="N", help="Override the file's seeds.")
    sub.add_argument("--data-root", metavar="DIR", help="Override common.data_root.")
    sub.add_argument("--device", metavar="NAME", help="Override common.device.")

    sub = add("report", _report, "Write the report of a job anew.", "divqat report runs/digits")
    sub.add_argument("out", metavar="OUT", help="Folder of the job.")
    sub = add("info", _info, "Versions, devices, and which backend serves which op.", "divqat info")
    sub.add_argument("--json", action="store_true", help="For programs.")
    return parser


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="Run folder of a qat or divqat training.")
    parser.add_argument("--data-root", metavar="DIR", help="Folder of the run's data set.")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text}")
    return value
