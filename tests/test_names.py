"""Names lead nowhere but into their folder, and an empty path is not the working folder."""

import os
from pathlib import Path

import pytest
from toys import toy_model, toy_splits

from divqat import cli
from divqat._util.names import check_folder, check_name
from divqat._util.settings import ConfigError
from divqat.attacks.folder import Folder
from divqat.evaluate import Grid, Subject, evaluate
from divqat.experiments.run import run_study
from divqat.experiments.study import Study
from divqat.train import TrainConfig, train

AWAY = [
    "", " ", ".", "..", "...", ".. ", "../x", "a/b", "a/", "/", "/tmp/x", "..\\x", "a\\b", "C:",
    "C:x", "\\\\host\\share", "a\0b", "a\nb", "a\udcff", "nul", "CON", "com1.txt", "Aux .x",
]  # fmt: skip
INSIDE = ["a", "qat-8", ".hidden", "a..b", "a b", "größe", "con-trol", "mad:l1=0.5", "-x"]


@pytest.mark.parametrize("name", INSIDE)
def test_names_of_folders(name, tmp_path):
    assert check_name("name", name) == name
    (tmp_path / check_name("name", name)).mkdir()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", [*AWAY, 1, None, b"a"])
def test_names_that_lead_elsewhere_are_refused_everywhere(name):
    with pytest.raises(ValueError, match="victim: wanted the name of a folder"):
        check_name("victim", name)
    with pytest.raises(ValueError, match="name: wanted the name of a folder"):
        Subject(name, toy_model().eval())
    with pytest.raises(ConfigError, match="victims: wanted"):
        Study.from_dict({"victims": {name: {"method": "qat"}}})


def divqat(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "C:x", "nul", "a\0b"])
def test_a_victim_is_not_called_so(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert divqat("evaluate", "--victim", f"{name}=model.onnx", "--out", "out") == 2
    assert "victim: wanted the name of a folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["here"] and not os.listdir()


@pytest.mark.parametrize("victim", ["", "a=", "/"])
def test_a_victim_lies_somewhere(tmp_path, capsys, victim):
    assert divqat("evaluate", "--victim", victim, "--out", tmp_path / "out") == 2
    assert "victim: wanted the " in capsys.readouterr().err


COMMANDS = {
    "train": ("--out", "{}"),
    "attack": ("--victim", "x", "--out", "{}"),
    "run": ("--config", "x", "--out", "{}"),
    "study": ("x", "--out", "{}"),
    "evaluate": ("--victim", "x", "--out", "{}"),
    "export": ("{}",),
    "verify": ("{}",),
    "report": ("{}",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_folder_is_refused(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    for path in ("", "  ", "a\0b"):
        with pytest.raises(SystemExit) as caught:
            divqat(command, *(part.format(path) for part in COMMANDS[command]))
        assert caught.value.code == 2
        assert "wanted the path of a folder ('.': this folder)" in capsys.readouterr().err
    assert not os.listdir()


def test_an_empty_setting_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("data_root", "teacher", "reference"):
        with pytest.raises(ConfigError, match=f"{key}: wanted text, got ''"):
            TrainConfig(**{"method": "qat", "teacher": "x", key: ""})


@pytest.mark.parametrize("out", ["", "a\0b"])
def test_functions_refuse_it_too(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    job = {"victims": {"qat": {"method": "qat"}}}
    calls = (
        lambda: train(TrainConfig(epochs=1), out),
        lambda: run_study(Study.from_dict(job), out),
        lambda: evaluate(
            [Subject("a", toy_model().eval())], toy_splits(), Grid(query_set="noise"), out
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="out: wanted the path of a folder"):
            call()
    with pytest.raises(ValueError, match="resume_dir: wanted the path of a folder"):
        Folder(out, {})
    assert not os.listdir()


def test_victims_of_one_folder_are_refused(tmp_path):
    model, grid = toy_model().eval(), Grid(query_set="noise", query_limit=20)
    for pair in (("a b", "a!b"), ("QAT", "qat")):
        subjects = [Subject(name, model) for name in pair]
        with pytest.raises(ValueError, match="victims with different names"):
            evaluate(subjects, toy_splits(), grid, tmp_path)


def test_this_folder_may_be_named():
    assert check_folder("out", ".") == Path()
