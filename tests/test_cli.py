import json
import runpy
import shutil
import signal
import sys
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from divqat import cli
from divqat._util.files import load_checkpoint, read_json
from divqat._util.settings import add_flags
from divqat.cli import commands
from divqat.data import ImageSet, Splits
from divqat.evaluate import Grid
from divqat.experiments import deploy as steps
from divqat.experiments.deploy import AttackConfig
from divqat.train import TrainConfig, load_run
from divqat.train import run as loop

ROOT = Path(__file__).parent.parent
FAST = ["--threads", "1", "--batch-size", "256"]
ATTACK = ["--query-set", "noise", "--budget", "300", "--epochs", "1", "--threads", "1"]


def divqat(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs made on the command line: fp, qat (exported) and raw (qat, not exported)."""
    out = tmp_path_factory.mktemp("runs")
    assert divqat("train", "--out", out / "fp", "--epochs", 3, *FAST) == 0
    train = ["--method", "qat", "--teacher", out / "fp", "--lr", 0.01, *FAST]
    assert divqat("train", "--out", out / "qat", "--epochs", 2, *train) == 0
    assert divqat("train", "--out", out / "raw", "--epochs", 1, *train) == 0
    assert divqat("export", out / "qat") == 0
    return out


@pytest.mark.slow
def test_train_prints_a_line_per_epoch(tmp_path, capsys):
    assert divqat("train", "--out", tmp_path, "--epochs", 2, *FAST) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for word in ("epoch 1/2", "loss", "ce", "val acc", "top prob", "lr", "ms/step", "s left"):
        assert word in lines[0]
    assert "left" not in lines[1]
    assert lines[2].startswith("test accuracy")


def test_config_file_and_flags(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("epochs: 1\nlr: 1e-2\nbatch_size: 256\nthreads: 1\n")
    assert divqat("train", "--config", file, "--lr", 0.02, "--out", tmp_path / "run") == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["epochs"], saved["lr"], saved["batch_size"]) == (1, 0.02, 256)
    assert saved["weight_decay"] == 5e-4


def test_flags_without_effect_are_reported(tmp_path, capsys):
    (tmp_path / "common.yaml").write_text("epochs: 1\nguard: true\nini_gamma: 2\n")
    command = ["train", "--config", tmp_path / "common.yaml", *FAST, "--out"]
    assert divqat(*command, tmp_path / "a") == 0
    assert capsys.readouterr().err == ""  # a file may serve several methods
    assert divqat(*command, tmp_path / "a", "--weight-bits", 4, "--weight", 0.5) == 0
    assert capsys.readouterr().err == (
        "divqat: warning: no effect with method fp and its other settings: --weight, "
        "--weight-bits\n"
    )


@pytest.mark.slow
def test_a_run_takes_data_and_model_from_its_teacher(tmp_path):
    settings = ["--epochs", 1, "--validation-fraction", 0.3, *FAST]
    assert divqat("train", "--out", tmp_path / "fp", *settings) == 0
    qat = ["--method", "qat", "--teacher", tmp_path / "fp", "--epochs", 1, *FAST]
    assert divqat("train", "--out", tmp_path / "qat", *qat) == 0
    saved = yaml.safe_load((tmp_path / "qat" / "config.yaml").read_text())
    assert saved["validation_fraction"] == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochz: 3", "unknown key in {file} 'epochz' (did you mean 'epochs'?)"),
        ("epochs: many", "epochs: wanted a whole number at least 0, got 'many'"),
        ("- epochs", "wanted 'key: value' lines"),
        ("epochs: [", "{file} is not YAML: line 1: expected the node content"),
        ("epochs: 1\n lr: 2\n", "{file} is not YAML: line 2: mapping values are not allowed"),
        ("epochs: 1\nlr: \a\n", "{file} is not YAML: line 2: unacceptable character #x0007"),
        (b"epochs: 1\n\nlr: \xff\n", "{file} is not YAML: line 3: 'utf-8' codec can't decode"),
        ("epochs: 2020-99-99", "{file} is not YAML: month must be in 1..12"),
        (1000 * "[", "{file} is not YAML: maximum recursion depth exceeded"),
    ],
)
def test_bad_config_file_is_a_usage_error(tmp_path, capsys, text, message):
    file = tmp_path / "train.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert divqat("train", "--config", file, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message.format(file=file) in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian",),
        ("train",),
        ("train", "--out", "x", "--epochs", "many"),
        ("train", "--out", "x", "--method", "quat"),
        ("train", "--out", "x", "--speed", "9"),
        ("verify", "x", "--min-agreement", "2"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        divqat(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: divqat")


def test_bad_value_of_a_flag_is_a_usage_error(tmp_path, capsys):
    assert divqat("train", "--out", tmp_path / "x", "--lr", "-1") == 2
    assert "lr: wanted a number above 0, got -1.0" in capsys.readouterr().err
    assert divqat("attack", "--victim", "x", "--answer", "everything") == 2
    assert "answer: wanted probs, label, top<k>" in capsys.readouterr().err


def test_failures_are_one_line_unless_debugged(tmp_path, capsys):
    command = ["train", "--out", tmp_path / "x", "--dataset", "cifar10", "--data-root", tmp_path]
    assert divqat(*command) == 1
    error = capsys.readouterr().err
    assert error.startswith("divqat: error: data set 'cifar10' was not found")
    assert error.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        divqat(*command, "--debug")


@pytest.mark.slow
def test_other_settings_in_the_folder_are_refused(runs, capsys):
    assert divqat("train", "--out", runs / "fp", "--epochs", 4, *FAST) == 1
    assert "(epochs: 3 -> 4)" in capsys.readouterr().err


def test_ctrl_c_says_how_to_resume(tmp_path, capsys, monkeypatch):
    def interrupted(config, out, log):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.training, "train", interrupted)
    assert divqat("train", "--out", tmp_path / "x") == 130
    assert f"divqat train --out {tmp_path / 'x'} --resume" in capsys.readouterr().err


def test_sigint_and_resume(tmp_path, capsys, monkeypatch):
    out, write = tmp_path / "run", loop.write_checkpoint

    def interrupted(folder, state):
        if state["epoch"] == 2:
            signal.raise_signal(signal.SIGINT)
        write(folder, state)

    monkeypatch.setattr(loop, "write_checkpoint", interrupted)
    # background jobs of a shell inherit that SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert divqat("train", "--out", out, "--epochs", 3, *FAST) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"divqat train --out {out} --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert load_checkpoint(out / "checkpoint.pt")["epoch"] == 1
    assert divqat("train", "--out", out, "--resume", "--epochs", 2) == 1
    assert divqat("train", "--out", out, "--resume") == 0
    assert "resuming after epoch 1 of 3" in capsys.readouterr().out
    assert read_json(out / "summary.json")["epochs"] == 3


def test_resume_needs_a_training(tmp_path, capsys):
    assert divqat("train", "--out", tmp_path, "--resume") == 1
    assert "no training at" in capsys.readouterr().err


def test_export_and_verify(runs, capsys):
    assert read_json(runs / "qat" / "export.json")["int8_layers"] == 5
    rows = read_json(runs / "qat" / "layers.json")["rows"]
    assert {r["kernel"] for r in rows if r["kind"] == "weight"} <= {"QLinearConv", "QGemm"}
    assert divqat("verify", runs / "qat") == 0
    assert "argmax agreement" in capsys.readouterr().out
    assert read_json(runs / "qat" / "verify.json")["n"] == 359  # the whole test set


def test_verify_fails_below_min_agreement(runs, capsys, monkeypatch):
    monkeypatch.setattr(commands, "verify_run", lambda *_: {"text": "", "least_agreement": 0.99})
    assert divqat("verify", runs / "qat") == 1
    assert "agreement 0.9900 is below 0.995" in capsys.readouterr().err
    assert divqat("verify", runs / "qat", "--min-agreement", 0.98) == 0


def test_export_of_full_precision_and_of_nothing(runs, tmp_path, capsys):
    attack = ["attack", "--victim", runs / "fp", "--out", tmp_path / "fp", *ATTACK]
    for command in (["export", runs / "fp"], ["verify", runs / "fp"], attack):
        assert divqat(*command) == 1
        assert (
            "only quantized runs are exported: attack it with divqat attack --fake-quant or divqat "
            "evaluate"
        ) in capsys.readouterr().err
    assert divqat(*attack, "--fake-quant") == 0
    assert "the model as trained" in capsys.readouterr().out
    assert divqat("export", tmp_path) == 1
    assert divqat("verify", runs / "raw") == 1
    assert "divqat export" in capsys.readouterr().err


def test_attack_needs_the_exported_model(runs, tmp_path, capsys):
    command = ["attack", "--victim", runs / "raw", "--out", tmp_path, *ATTACK]
    assert divqat(*command) == 1
    assert f"divqat export {runs / 'raw'}" in capsys.readouterr().err
    assert divqat(*command, "--fake-quant") == 0
    assert "the model as trained" in capsys.readouterr().out


def test_attack_prints_accuracy_and_fidelity_and_its_folder_has_one_victim(runs, tmp_path, capsys):
    command = ["attack", "--victim", runs / "qat", "--answer", "label", "--out", tmp_path, *ATTACK]
    assert divqat(*command) == 0
    shown = capsys.readouterr().out
    summary = read_json(tmp_path / "summary.json")
    assert summary["queries"] == 300
    assert f"clone accuracy   {summary['accuracy']:.2%}" in shown
    assert f"clone fidelity   {summary['fidelity']:.2%}" in shown
    assert divqat(*command) == 0  # without new queries
    command[command.index("label")] = "probs"
    assert divqat(*command) == 1
    assert "holds another attack (answer: label -> probs)" in capsys.readouterr().err


def test_attack_reads_a_config_file(runs, tmp_path, capsys):
    file = tmp_path / "attack.yaml"
    file.write_text("query_set: noise\nbudget: 600\nepochs: 1\nthreads: 1\n")
    attack = ["attack", "--victim", runs / "qat", "--config", file, "--out", tmp_path / "attack"]
    assert divqat(*attack, "--budget", 300) == 0
    assert "300 of noise" in capsys.readouterr().out
    file.write_text("querry_set: noise\n")
    assert divqat(*attack) == 2
    assert "query_set" in capsys.readouterr().err


def test_answers():
    assert steps.answer_arguments("top3") == {"answer": "topk", "k": 3}
    assert steps.answer_arguments("rounded2") == {"answer": "rounded", "decimals": 2}


@pytest.mark.slow
def test_a_retrained_model_is_not_mistaken_for_its_export(runs, tmp_path):
    train = ["--method", "qat", "--teacher", runs / "fp", "--epochs", 1, *FAST]
    out = tmp_path / "qat"
    shutil.copytree(runs / "qat", out)
    (out / "checkpoint.pt").unlink()
    assert divqat("train", "--out", out, "--seed", 1, *train) == 0
    assert divqat("verify", out) == 1
    assert divqat("export", out) == 0
    assert divqat("verify", out, "--min-agreement", 0) == 0


@pytest.mark.parametrize(
    ("name", "command", "remedy"),
    [
        ("checkpoint.pt", "train --out {} --resume", "delete it and repeat the command"),
        ("checkpoint.pt", "verify {}", "delete it and repeat the command"),
        ("summary.json", "train --out {} --resume", "delete it and repeat the command"),
        ("export.json", "verify {}", "delete it and repeat the command"),
        ("model.onnx", "verify {}", "divqat export {}"),
        ("model.onnx", "attack --victim {} --query-set noise", "divqat export {}"),
        (
            "model.onnx",
            "evaluate --victim {}/model.onnx --out {}/out --dataset digits --query-set noise",
            "divqat export {}",
        ),
        ("transfer.pt", f"attack --victim {{}} --out {{}} {' '.join(ATTACK)}", "delete it"),
    ],
)
def test_a_damaged_file_is_detected_before_it_is_used(
    runs, tmp_path, capsys, name, command, remedy
):
    run = tmp_path / "run"
    shutil.copytree(runs / "qat", run)
    if name == "transfer.pt":
        assert divqat("attack", "--victim", run, "--out", run, *ATTACK) == 0
        (run / "summary.json").unlink()
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)
    before = {path.name for path in run.iterdir()}
    assert divqat(*command.replace("{}", str(run)).split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"divqat: error: {run / name}")
    assert remedy.replace("{}", str(run)) in error and error.count("\n") == 1
    assert {path.name for path in run.iterdir()} == before


def test_a_run_folder_of_an_older_divqat_works_with_a_warning(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "qat", run)
    for path in run.glob("*.json"):
        value = read_json(path)
        value.pop("sha256", None)
        path.write_text(json.dumps(value))
    torch.save(load_checkpoint(run / "checkpoint.pt"), run / "checkpoint.pt")
    before = (run / "model.onnx").stat().st_mtime_ns
    with pytest.warns(UserWarning, match="files without a checksum, as written by an older divqat"):
        assert divqat("export", run) == 0
        assert divqat("verify", run) == 0
        assert divqat("train", "--out", run, "--resume") == 0
    assert (run / "model.onnx").stat().st_mtime_ns == before


def test_a_training_whose_folder_is_deleted_fails(tmp_path, capsys, monkeypatch):
    def line(row, epochs):
        shutil.rmtree(tmp_path / "run")
        return "an epoch"

    monkeypatch.setattr(loop, "_epoch_line", line)
    assert divqat("train", "--out", tmp_path / "run", "--epochs", 1, *FAST) == 1
    assert f"{tmp_path / 'run'} was deleted, moved or replaced" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_attack_sees_no_training_data(runs):
    """The attack must give the same clone when labels and training images are replaced."""
    run = load_run(runs / "qat")
    splits = run.splits()
    blank = ImageSet(torch.zeros_like(splits.train.images), torch.zeros_like(splits.train.labels))
    other = Splits(splits.name, splits.classes, blank, blank, splits.test)
    config = steps.AttackConfig(query_set="noise", budget=200, epochs=1, threads=1)
    found = [
        steps.attack_run(run, s, config, "probs", runs / f"blind{i}")
        for i, s in enumerate((splits, other))
    ]
    assert found[0]["accuracy"] == found[1]["accuracy"]


def test_info(capsys):
    assert divqat("info") == 0
    text = capsys.readouterr().out
    assert "fake_quantize" in text and "torch" in text
    assert divqat("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == torch.__version__
    assert info["devices"][0] == "cpu" and info["cpu_threads"] >= 1
    assert set(info["backends"]["divergence_loss"]) == {"cpu", "cuda"}
    assert set(info["native_kernels"]) == {"cpu", "cuda"}


@pytest.mark.parametrize(
    "command", ["train", "export", "verify", "attack", "run", "report", "info"]
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        divqat(command, "--help")
    assert caught.value.code == 0
    assert f"example: divqat {command}" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [TrainConfig, AttackConfig, Grid])
def test_the_help_shows_no_value_that_a_flag_does_not_take(settings):
    parser = ArgumentParser()
    add_flags(parser, settings)
    helps = {action.dest: action.help for action in parser._actions}
    assert helps["threads"].startswith("CPU threads; if not given: all.")
    for spec in fields(settings):
        assert "None" not in helps[spec.name], spec.name
        assert ("(default: " in helps[spec.name]) == (spec.default is not None), spec.name


def test_python_m_divqat(capsys, monkeypatch):
    """test_pipeline.py runs it in its own process."""
    monkeypatch.setattr(sys, "argv", ["divqat", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("divqat", run_name="__main__")
    assert not caught.value.code and capsys.readouterr().out.startswith("divqat ")
