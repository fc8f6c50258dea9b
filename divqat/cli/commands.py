"""The commands of ``divqat``. Each takes the parsed flags and returns an exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from divqat import train as training
from divqat._util.foreign import trusted
from divqat._util.settings import ConfigError, given_flags, read_yaml
from divqat._util.text import printable
from divqat.cli.ending import Pace, beside, browser, ending
from divqat.evaluate import Evaluation, Grid, write_report
from divqat.evaluate import evaluate as run_grid
from divqat.evaluate.audits import audits
from divqat.evaluate.tables import main_table, side_effects_table
from divqat.experiments.deploy import (
    FILES,
    RUNTIMES,
    AttackConfig,
    answer_arguments,
    attack_run,
    export_run,
    report_file,
    verify_run,
)
from divqat.experiments.run import run_study
from divqat.experiments.sensitivity import (
    SensitivityConfig,
    mixed_precision_run,
    sensitivity_run,
    what_next,
)
from divqat.experiments.study import Study
from divqat.experiments.subjects import load_subjects
from divqat.ownership import check, write_verdict
from divqat.ownership.page import sentence
from divqat.quantize.layer_bits import expand_layer_bits
from divqat.train import TrainConfig, load_run
from divqat.train.config import SHARED
from divqat.train.distributed import rank_and_world_size
from divqat.train.folder import read_checkpoint
from divqat.victim import Victim
from divqat.victim.runners import SUFFIXES


def train(args: argparse.Namespace) -> int:
    config = _train_config(args)
    unused = [name for name in given_flags(args, TrainConfig) if name in config.unused]
    if unused and rank_and_world_size()[0] == 0:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        print(
            f"divqat: warning: no effect with method {config.method} and its other settings: "
            f"{flags}",
            file=sys.stderr,
        )
    training.train(config, args.out, log=Pace())
    if rank_and_world_size()[0] == 0:
        trust = [word for name in trusted() for word in ("--trust", name)]
        following = ["divqat", "train", "--method", "qat", "--teacher", args.out, *trust]
        following += ["--out", beside(args.out, "qat")]
        if config.kind.quantized:
            following = ["divqat", "export", args.out, *trust]
        ending(args.out, following)
    return 0


def _train_config(args: argparse.Namespace) -> TrainConfig:
    """Settings from defaults, the teacher (those that a run shares with it), ``--config`` and
    flags, in rising priority. With ``--resume`` the run folder replaces the first three."""
    flags = given_flags(args, TrainConfig)
    if "layer_bits" in flags:
        flags["layer_bits"] = expand_layer_bits(flags["layer_bits"])
    if args.resume:
        if args.config is not None:
            raise ConfigError("--resume takes the settings from the run folder: leave out --config")
        return TrainConfig.from_dict({**read_checkpoint(Path(args.out))["config"], **flags})
    file = {} if args.config is None else read_yaml(args.config)
    given = {**file, **flags}
    # Validate before loading the teacher: a misspelt key is the more likely mistake.
    config = TrainConfig.from_dict(given, where=args.config or "")
    if config.teacher is None:
        return config
    teacher = load_run(config.teacher).config
    return TrainConfig.from_dict({**{name: getattr(teacher, name) for name in SHARED}, **given})


def export(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("normalize_inside", "opset", "pack_int4")}
    run = load_run(args.run)
    print(printable(export_run(run, run.splits(args.data_root), args.to, options)["text"]))
    flags = [] if args.to == "onnx" else ["--runtime", args.to]
    ending(run.folder / FILES[args.to], ["divqat", "verify", args.run, *flags, *_same(args)])
    return 0


def verify(args: argparse.Namespace) -> int:
    run, to = load_run(args.run), RUNTIMES[args.runtime]
    report = verify_run(run, run.splits(args.data_root), to)
    print(printable(report["text"]))
    if report["least_agreement"] < args.min_agreement:
        print(
            f"divqat: error: agreement {report['least_agreement']:.4f} is below "
            f"{args.min_agreement}",
            file=sys.stderr,
        )
        return 1
    victim = [args.run]
    if to != "onnx":  # a file does not name its data set
        victim = [str(run.folder / FILES[to]), "--dataset", run.config.dataset]
    following = ["divqat", "evaluate", "--victim", *victim, *_same(args)]
    following += ["--out", beside(args.run, "evaluation")]
    ending(run.folder / report_file("verify", to), following)
    return 0


def sensitivity(args: argparse.Namespace) -> int:
    settings = SensitivityConfig(**given_flags(args, SensitivityConfig))
    run = load_run(args.run)
    splits = run.splits(args.data_root)
    print(printable(sensitivity_run(run, splits, settings)["text"]))
    if settings.mixed_precision is not None:
        print("\n" + printable(mixed_precision_run(run, splits, settings)["text"]))
    ending(*what_next(run, settings))
    return 0


def _same(args: argparse.Namespace) -> list[str]:
    """The flags that the next command needs as well."""
    root = [] if args.data_root is None else ["--data-root", args.data_root]
    return [*root, *(word for name in args.trust for word in ("--trust", name))]


def attack(args: argparse.Namespace) -> int:
    answer_arguments(args.answer)
    file = {} if args.config is None else read_yaml(args.config)
    given = {**file, **given_flags(args, AttackConfig)}
    config = AttackConfig.from_dict(given, where=args.config or "")
    run = load_run(args.victim)
    out = Path(args.out or run.folder / f"attack-{args.answer}")
    result = attack_run(
        run, run.splits(args.data_root), config, args.answer, out, fake_quant=args.fake_quant
    )
    kind = "the model as trained" if args.fake_quant else "the exported int8 model"
    print(f"victim           {run.folder}: {kind}, accuracy {result['victim_accuracy']:.2%}")
    print(f"queries          {result['queries']} of {config.query_set}, answers {args.answer}")
    print(f"clone accuracy   {result['accuracy']:.2%}")
    print(f"clone fidelity   {result['fidelity']:.2%} (same class as the victim)")
    following = ["divqat", "evaluate", "--victim", args.victim, *_same(args)]
    ending(out, [*following, "--out", beside(args.victim, "evaluation")])
    return 0


def evaluate(args: argparse.Namespace) -> int:
    file = {} if args.config is None else read_yaml(args.config)
    grid = Grid.from_dict({**file, **given_flags(args, Grid)}, where=args.config or "")
    subjects, splits, deployed = load_subjects(
        args.victim, dataset=args.dataset, data_root=args.data_root, fake_quant=args.fake_quant
    )
    result = run_grid(
        subjects, splits, grid, args.out, command=args.command_line, deployed=deployed
    )
    print(f"{_tables(result)}\n")
    for audit in audits(result):
        print(printable(audit))
    return _end_with_report(args.out)


def _end_with_report(out: str) -> int:
    page = Path(out) / "report.html"
    ending(page, browser(page))
    return 0


def study(args: argparse.Namespace) -> int:
    settings = Study.from_dict(_study_file(args))
    result = run_study(
        settings, args.out, jobs=args.jobs, cluster=args.cluster, command=args.command_line,
        log=Pace(),
    )  # fmt: skip
    print(f"{_tables(result)}\n")
    return _end_with_report(args.out)


def _tables(result: Evaluation) -> str:
    """The main tables of an evaluation, printed at the end of a command."""
    return f"\n{main_table(result).markdown()}\n\n{side_effects_table(result).markdown()}"


def _study_file(args: argparse.Namespace) -> dict[str, Any]:
    """The content of a study's YAML file, overridden by flags."""
    data = read_yaml(args.config)
    if args.seeds is not None:
        data["seeds"] = args.seeds
    attacks = "attack" if "attack" in data else "evaluate"  # has its own device setting
    overridden = (
        ("common", "data_root"), ("common", "device"), (attacks, "query_root"), (attacks, "device"),
    )  # fmt: skip
    for section, flag in overridden:
        if getattr(args, flag) is not None:
            data[section] = {**(data.get(section) or {}), flag: getattr(args, flag)}
    return data


def report(args: argparse.Namespace) -> int:
    write_report(args.out)
    return _end_with_report(args.out)


def ownership(args: argparse.Namespace) -> int:
    path = Path(args.suspect)
    model = str(path) if path.suffix in SUFFIXES else load_run(path).model
    suspect = Victim(model, **answer_arguments(args.answer))
    verdict = check(
        suspect, args.secret, nonce=args.nonce, alpha=args.alpha, data_root=args.data_root
    )
    names = {"suspect": args.suspect, "secret": args.secret}
    out = args.out or Path(args.secret) / f"ownership-{path.resolve().stem}"
    page = write_verdict(verdict, out, **names)
    print(printable(sentence(verdict, **names)))
    ending(page, browser(page))
    return 0


def info(args: argparse.Namespace) -> int:
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
    print()
    demo = ["divqat", "run", "--config", "configs/digits.yaml", "--out", "runs/digits"]
    ending(info["package"], demo)
    return 0


def _collect_info() -> dict[str, Any]:
    import torch

    from divqat._util.devices import hardware, versions
    from divqat.ops import backends, native_kernels

    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    missing = {"triton", "onnx", "onnxruntime"} - versions().keys()
    return {
        "package": str(Path(__file__).parent.parent),
        "devices": ["cpu", *gpus],
        "hardware": hardware(),
        "cpu_threads": torch.get_num_threads(),
        "versions": versions() | dict.fromkeys(sorted(missing), "not installed"),
        "native_kernels": native_kernels(),
        "backends": backends(),
    }
