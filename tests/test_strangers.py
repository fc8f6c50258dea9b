"""Run folders, jobs and studies that somebody else made: SECURITY.md, held to its word."""

import io
import os
import socket
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import yaml

import divqat
from divqat import cli
from divqat._util.files import WriteError, load_checkpoint, read_json, save_checkpoint, write_atomic
from divqat._util.foreign import check_trusted, trusted
from divqat._util.settings import ConfigError, read_yaml
from divqat.cli import commands
from divqat.evaluate import Grid, write_report
from divqat.experiments import workers
from divqat.experiments.deploy import AttackConfig
from divqat.experiments.study import Study
from divqat.experiments.subjects import load_subjects
from divqat.train import TrainConfig, load_run, train
from divqat.train.network import build_model

SHAPE = {"in_channels": 1, "num_classes": 10, "image_size": [8, 8]}
MODULE = """
from pathlib import Path
from divqat.models import LeNet

Path("it_ran").touch()

def net(in_channels, num_classes, image_size):
    return LeNet(in_channels, num_classes, image_size)
"""


def write_run(folder, model="lenet", changes=None):
    """A finished run folder; ``changes`` are of its checkpoint."""
    config = TrainConfig(method="qat", teacher="nowhere", epochs=1, threads=1)
    state = {
        "config": config.to_dict() | {"model": model},
        "shape": SHAPE,
        "teacher": None,
        "epoch": 1,
        "model": build_model(config, SHAPE).state_dict(),
        "optimizer": {},
        "rows": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "checkpoint.pt", state | (changes or {}))
    return folder


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """``module:function`` that a run folder and files in the current folder name."""
    module = f"theirs_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"{module}:net"
    write_run(tmp_path / "run", name)
    victims = {"qat": {"method": "qat"}}
    files = {
        "train": {"model": name},
        "attack": {"clone": name},
        "evaluate": {"clones": ["lenet", name]},
        "surrogate": {"surrogate": name},
        "job": {"common": {"model": name}, "victims": victims},
        "thief": {"victims": victims, "attack": {"clone": name}},
        "study": {"victims": {"qat": {"method": "qat", "model": name}}},
        "cells": {"victims": victims, "evaluate": {"clones": [name]}},
    }
    for file, content in files.items():
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(content))
    return name


@pytest.mark.parametrize(
    "command",
    [
        "train --method qat --teacher run --out out",
        "train --method divqat --teacher run --reference run --accuracy-budget 1 --out out",
        "train --out run --resume",
        "train --config train.yaml --out out",
        "export run",
        "verify run",
        "attack --victim run",
        "attack --victim run --fake-quant",
        "attack --victim run --config attack.yaml",
        "evaluate --victim run --out out",
        "evaluate --victim run --fake-quant --out out",
        "evaluate --victim x=run --config evaluate.yaml --out out",
        "evaluate --victim run --config surrogate.yaml --out out",
        "run --config job.yaml --out out",
        "run --config thief.yaml --out out",
        "study study.yaml --out out",
        "study study.yaml --out out --jobs 2 --seeds 0 1",
        "study cells.yaml --out out",
    ],
)
def test_code_that_only_a_file_names_is_not_imported(theirs, tmp_path, capsys, command):
    other = ["--trust", "another:net"]  # names of others do not help
    assert cli.main([*command.split(), *other]) == 2
    error = capsys.readouterr().err
    module = theirs.partition(":")[0]
    assert f"would be imported: the module {module} ({tmp_path / module}.py)" in error
    assert f"--trust {theirs}" in error
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "out").exists()


def test_python_asks_for_trust_too(theirs, tmp_path):
    victims = {"qat": {"method": "qat"}}
    for read in (
        lambda: load_run("run"),
        lambda: load_subjects(["run"]),
        lambda: train(TrainConfig(method="qat", teacher="run", epochs=1), "out"),
        lambda: TrainConfig.from_dict({"model": theirs}),
        lambda: AttackConfig.from_dict({"clone": theirs}),
        lambda: Grid.from_dict({"clones": [theirs]}),
        lambda: Study.from_dict({"victims": victims, "evaluate": {"surrogate": theirs}}),
    ):
        with pytest.raises(ConfigError, match=r"with divqat\.trust\("):
            read()
    assert not (tmp_path / "it_ran").exists()
    with divqat.trust(theirs):
        assert load_run("run").config.model == theirs
    assert (tmp_path / "it_ran").exists() and trusted() == ()


def test_the_command_line_trusts_what_it_names(theirs, tmp_path, monkeypatch):
    seen = []
    for name in ("train", "attack", "evaluate", "export", "study"):
        monkeypatch.setattr(commands, name, lambda args: seen.append(trusted()) or 0)
    for flags in (
        f"train --model {theirs} --out out",
        f"attack --victim run --clone {theirs}",
        f"evaluate --victim run --clones lenet {theirs} --out out",
        f"evaluate --victim run --surrogate {theirs} --out out",
        f"export run --trust {theirs}",
        f"run --config job.yaml --out out --trust {theirs}",
        f"study study.yaml --out out --trust {theirs}",
    ):
        assert cli.main(flags.split()) == 0
    assert seen == [(theirs,)] * 7 and trusted() == ()
    foreign = {f"--{spec}" for spec in ("model", "clone", "clones", "surrogate")}
    assert foreign == {
        f"--{name}"
        for kind in (TrainConfig, AttackConfig, Grid)
        for name, (spec, *_) in divqat._util.settings._specs(kind).items()
        if spec.metadata["foreign"]
    }


def test_trust_wants_a_function(theirs, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "run", "--trust", "run"])
    assert "--trust: wanted module:function, got run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"trust: wanted module:function, got 'os'"):
        divqat.trust("os").__enter__()


def test_to_say_what_would_be_imported_imports_nothing(tmp_path, monkeypatch):
    package = tmp_path / f"package_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"the module {package.name} \({package}"):
        check_trusted(f"{package.name}.nets:net")
    with pytest.raises(ValueError, match=r"the module nowhere_at_all \(not found\)"):
        check_trusted("nowhere_at_all:net")


def note_trusted(path):
    path.write_text(" ".join(trusted()))


def test_workers_trust_the_same(tmp_path):
    with divqat.trust("nets:net"), ThreadPoolExecutor() as other:  # a thread trusts nothing yet
        task = workers.Task("task", note_trusted, (tmp_path / "names",))
        workers.run_tasks([task], other, print)
    assert (tmp_path / "names").read_text() == "nets:net" and trusted() == ()


ALIASES = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
MERGES = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(["a0: &a0 [x, x, x]", *ALIASES]), "expand to more than"),
        ("\n".join(["a0: &a0 {x: 1}", *MERGES]), "expand to more than"),
        (f"a: &a {'x' * 60_000}\nb: [{', '.join(['*a'] * 1000)}]", "expand to more than"),
        ("a: &a [*a]", "it contains itself"),
        ("a: " + "[" * 2000, "recursion"),
        ("a: " + "9" * 10_000, "4300 digits"),
        ("a: " + "x" * 70_000, "at most 65536 bytes, got 70003"),
        ("a: 2001-99-99", "month"),
        ("a: !!timestamp x", "is not YAML"),
        ("a: !!int ''", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_yaml_of_the_kind_that_fills_the_memory(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"{file}.*{message}"):
        read_yaml(file)


def test_yaml_may_repeat_settings(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {lr: 1, epochs: [1, 2]}\nb: {<<: *a, lr: 2}\nc: *a\n")
    content = read_yaml(tmp_path / "x.yaml")
    assert content["b"] == {"lr": 2, "epochs": [1, 2]} and content["c"] == content["a"]


def odd_places(folder):
    """By name, what a folder must not hold."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")

    def listen(path):
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's name is short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)

    return {
        "a pipe": os.mkfifo,
        "a socket": listen,
        "leads out of": lambda path: path.symlink_to("/dev/zero"),
        "leads out": lambda path: path.symlink_to(os.path.relpath(outside / "file", path.parent)),
        "is a link that": lambda path: path.symlink_to(outside),
        "leads out of .*, to": lambda path: path.symlink_to(outside / "to come"),
        "many levels|loop": lambda path: path.symlink_to(path),
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
@pytest.mark.parametrize("place", ["metrics.csv", "plots", "seed0/qat/summary.json"])
def test_run_folders_hold_files_and_stay_inside(tmp_path, place):
    folder = write_run(tmp_path / "run")
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    opens = (
        lambda: load_run(folder),
        lambda: train(TrainConfig(epochs=1), folder),
        lambda: write_report(folder),
    )
    for number, (message, make) in enumerate(odd_places(folder).items()):
        make(folder / place)
        with pytest.raises(ValueError, match=rf"{place}.*{message}"):
            opens[number % len(opens)]()
        (folder / place).unlink()
    (folder / place).symlink_to(folder / "checkpoint.pt")  # inside
    assert load_run(folder).epoch == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_is_no_json_file(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json: wanted a file, got a pipe"):
        read_json(tmp_path / "x.json")


def rezip(path, *, compress=zipfile.ZIP_STORED, again=0):
    """Rewrite a checkpoint's zip file; ``again``: its largest part so many times, in one place."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        archive.filelist += [largest] * again
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ({"x": torch.zeros(2**16)}, {"compress": zipfile.ZIP_DEFLATED}, "it is compressed"),
        ({"x": torch.zeros(2**16)}, {"again": 1000}, "its parts overlap"),
        ({"x": torch.zeros(1).expand(2**40)}, None, "expand to more than"),
        ({"x": [torch.zeros(2**16)] * 1000}, None, "expand to more than"),
    ],
)
def test_a_checkpoint_is_no_larger_than_its_file(tmp_path, content, changes, message):
    file = tmp_path / "x.pt"
    torch.save(content, file)
    if changes is not None:
        rezip(file, **changes)
    with pytest.raises(ValueError, match=rf"x\.pt is not a readable .*{message}"):
        load_checkpoint(file)


def test_a_checkpoint_of_lists_of_lists(tmp_path):
    laughs = ["x"] * 9
    for _ in range(30):
        laughs = [laughs] * 9
    write_run(tmp_path, changes={"rows": laughs})
    with pytest.raises(ValueError, match="expand to more than"):
        load_run(tmp_path)
    own = []
    own.append(own)
    write_run(tmp_path, changes={"rows": own})
    with pytest.raises(ValueError, match="it contains itself"):
        load_run(tmp_path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "it ran"),))

    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"x": Evil()}, tmp_path / "x.pt", **options)
        with pytest.raises(ValueError, match=r"x\.pt is not a readable"):
            load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": SHAPE | {"image_size": [4000, 4000]}}, "wanted .* weights, got"),
        ({"shape": SHAPE | {"num_classes": 10**9}}, "wanted .* weights, got"),
        ({"shape": SHAPE | {"num_classes": 10**18}}, "is not from a training"),
        ({"shape": SHAPE | {"image_size": [10**5, 10**5]}}, "invalid or too large"),
        ({"shape": SHAPE | {"image_size": [8]}}, "the shape is invalid"),
        ({"shape": SHAPE | {"in_channels": True}}, "the shape is invalid"),
        ({"shape": SHAPE | {"in_channels": "1"}}, "the shape is invalid"),
        ({"shape": {}}, "in_channels"),
        ({"shape": 7}, "shape is a int"),
        ({"epoch": "many"}, "epoch is a str"),
        ({"config": [1]}, "config is a list"),
        ({"model": [1]}, "model is a list"),
    ],
)
def test_a_run_is_what_its_weights_are(tmp_path, changes, message):
    write_run(tmp_path, changes=changes)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt is not from a training: .*{message}|"
                       rf"checkpoint\.pt {message}"):  # fmt: skip
        load_run(tmp_path)


def test_how_many_processes_decode_is_not_for_the_folder_to_say(tmp_path, monkeypatch):
    run = load_run(write_run(tmp_path))
    run = replace(run, config=replace(run.config, workers=100_000))
    monkeypatch.setattr("divqat.train.folder.load_splits", lambda config, root: config.workers)
    assert run.splits() is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_new_files_have_the_permissions_of_any_new_file(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("files of other threads have it"))
            file = write_atomic(tmp_path / "x.txt", lambda path: path.write_text("x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_temporary_is_a_new_file(tmp_path, monkeypatch):
    """A link that somebody has put in its place is not followed."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "known")
    names = []
    write_atomic(tmp_path / "x.txt", lambda path: names.append(path) or path.write_text("x"))
    names[0].symlink_to(tmp_path / "victim")
    with pytest.raises(WriteError, match="File exists"):
        write_atomic(tmp_path / "x.txt", lambda path: path.write_text("y"))
    assert not (tmp_path / "victim").exists()
