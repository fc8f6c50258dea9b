"""``divqat run``: a study in its short form, from the command line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from divqat import cli
from divqat._util.settings import ConfigError
from divqat.cli import commands
from divqat.evaluate import Evaluation, Grid, assessment
from divqat.experiments import deploy
from divqat.experiments import run as study_run
from divqat.experiments.study import Study

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
JOB = {
    "seeds": [0],
    "common": {"dataset": "digits", "model": "lenet", "batch_size": 256, "threads": 1},
    "fp": {"epochs": 2},
    "victims": {
        "qat": {"method": "qat", "epochs": 2, "lr": 0.01},
        "divqat": {"method": "divqat", "epochs": 2, "lr": 0.01, "weight": 0.1},
    },
    "attack": {
        "query_set": "noise",
        "budget": 300,
        "clone": "lenet",
        "epochs": 1,
        "threads": 1,
        "answers": ["probs", "label", "top2"],
    },
}


def divqat(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A finished job that was never interrupted."""
    out = tmp_path_factory.mktemp("job")
    (out / "job.yaml").write_text(yaml.safe_dump(JOB, sort_keys=False))
    assert divqat("run", "--config", out / "job.yaml", "--out", out / "out") == 0
    return out


def test_run_does_everything(job, capsys):
    out = job / "out"
    result = Evaluation.load(out / "evaluation.json")
    cells = [(cell.victim, cell.attack, cell.queries) for cell in result.cells]
    attacks = ("knockoff", "knockoff:reading=label", "knockoff:reading=top2")
    assert cells == [(name, attack, 300) for name in ("qat", "divqat") for attack in attacks]
    for row in result.released:
        assert row.deterministic and row.distributions and row.agreement > 0.98
    assert "divqat run --config" in result.command
    assert "data:image/png;base64" in (out / "report.html").read_text()
    report = (out / "report.md").read_text()
    assert re.search(r"^\| divqat .*\| +5 \| +0 \|$", report, re.MULTILINE)  # layers
    assert divqat("report", out) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"results  {out / 'report.html'}"


def test_a_finished_job_neither_trains_nor_queries(job, capsys, monkeypatch):
    for name in ("export_onnx", "verify"):
        monkeypatch.setattr(deploy, name, None)
    monkeypatch.setattr(assessment, "run_attack", None)
    assert divqat("run", "--config", job / "job.yaml", "--out", job / "out") == 0
    shown = capsys.readouterr().out
    assert "| qat " in shown and "| divqat " in shown
    assert shown.rstrip().endswith("report.html")


def measured(folder):
    """All results of an evaluation except times."""
    result = Evaluation.load(folder / "out" / "evaluation.json")
    cells = [replace(cell, seconds=0) for cell in result.cells]
    return cells, result.released, result.side_effects


def test_a_killed_job_resumes_to_the_same_result(job, tmp_path):
    """Killed during an attack; the earlier parts are copied from an uninterrupted job."""
    shutil.copytree(job / "out", tmp_path / "out")
    for name in ("evaluation.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    cells = tmp_path / "out" / "cells" / "seed0"
    shutil.rmtree(cells)
    shutil.rmtree(tmp_path / "out" / "seed0" / "divqat")
    command = [sys.executable, "-m", "divqat", "run", "--config", str(job / "job.yaml")]
    command += ["--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(cells.glob("qat/none/*/*/*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert divqat("run", "--config", job / "job.yaml", "--out", tmp_path / "out") == 0
    assert measured(tmp_path) == measured(job)


def test_temporary_files_of_a_killed_job_are_ignored(job, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(job / "out", out)
    (out / "evaluation.json").unlink()
    for folder in (out / "seed0", out / "seed0" / "fp", out / "cells" / "seed0" / "qat" / "none"):
        for name in (".divqat-0123abcd-1-0123abcd-xyz.tmp", ".summary-abc.json", "mine.json"):
            (folder / name).write_text("{")
    monkeypatch.setattr(assessment, "run_attack", None)
    assert divqat("run", "--config", job / "job.yaml", "--out", out) == 0
    assert measured(tmp_path) == measured(job)


CELL = "../cells/seed0/qat/none/knockoff-300-lenet"
READ = {
    "run": ("fp/summary", "qat/verify", "../cells/seed0/qat/none/released", CELL),
    "report": ("../evaluation", "fp/summary", "qat/metrics.csv", "qat/layers"),
}


@pytest.mark.parametrize("command", READ)
def test_a_changed_number_is_detected_before_it_is_used(job, tmp_path, capsys, command):
    out = tmp_path / "out"
    shutil.copytree(job / "out", out)
    arguments = ["--config", job / "job.yaml", "--out", out] if command == "run" else [out]
    for name in READ[command]:
        path = out / "seed0" / name
        path = (path if path.suffix else path.with_suffix(".json")).resolve()
        whole = path.read_text()
        place = max(whole.rfind(digit) for digit in "12345678")
        path.write_text(whole[:place] + "9" + whole[place + 1 :])
        assert divqat(command, *arguments) == 1
        error = capsys.readouterr().err
        assert f"error: {path}" in error and "changed or cut" in error
        path.write_text(whole)
    assert divqat("report", out) == 0


def test_a_job_whose_folder_is_deleted_fails(job, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(job / "out", out)
    monkeypatch.setattr(study_run, "evaluate", lambda *args, **more: shutil.rmtree(out, True))
    assert divqat("run", "--config", job / "job.yaml", "--out", out) == 1
    assert f"{out} was deleted, moved or replaced" in capsys.readouterr().err
    assert not out.exists()


def test_job_with_other_settings_is_refused(job, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**JOB, "fp": {"epochs": 3}}))
    assert divqat("run", "--config", file, "--out", job / "out") == 1
    assert "(epochs: 2 -> 3)" in capsys.readouterr().err


def test_a_job_of_an_older_divqat_is_not_resumed(job, tmp_path, capsys):
    shutil.copytree(job / "out", tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").unlink()
    (tmp_path / "out" / "result.json").write_text("{}")
    assert divqat("run", "--config", job / "job.yaml", "--out", tmp_path / "out") == 1
    assert "holds results of an older divqat (result.json)" in capsys.readouterr().err
    assert divqat("report", tmp_path / "out") == 1
    assert "no evaluation at" in capsys.readouterr().err


def test_finished_job_may_be_moved(job, tmp_path, monkeypatch):
    (job / "out").rename(job / "moved")
    monkeypatch.setattr(assessment, "run_attack", None)
    monkeypatch.chdir(job)
    command = ["run", "--config", "job.yaml", "--out", "moved", "--data-root", tmp_path]
    assert divqat(*command, "--device", "cpu") == 0
    (job / "moved").rename(job / "out")


@pytest.mark.parametrize("command", ["run", "study"])
def test_the_device_flag_also_sets_the_device_of_the_attacks(command, tmp_path, monkeypatch):
    made = []

    def stop(settings, *args, **kwargs):
        made.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_study", stop)
    file = tmp_path / "job.yaml"
    section = "attack" if command == "run" else "evaluate"
    data = {"victims": {"qat": {"method": "qat"}}, section: {"query_set": "noise"}}
    file.write_text(yaml.safe_dump(data))
    config = ["--config", file] if command == "run" else [file]
    assert divqat(command, *config, "--out", tmp_path, "--device", "cuda:7") == 130
    assert made[0].training("qat", 0, tmp_path).device == made[0].grid.device == "cuda:7"


def test_the_short_form_is_a_grid():
    attack = {"answers": ["probs", "rounded2"], "momentum": 0.5, "budget": 7, "lr": 0.1}
    grid = Study.from_dict({**JOB, "attack": {"query_set": "noise", **attack}}).grid
    own = Grid(
        attacks=("knockoff", "knockoff:reading=rounded2"), clones=("lenet",), query_set="noise",
        query_limit=7, lr=0.1, momentum=0.5, epsilons=(),
    )  # fmt: skip
    assert grid == own
    assert grid.attack(grid.attacks[0], 7, 0).momentum == 0.5
    with pytest.raises(ConfigError, match="attack: wanted either it or evaluate, of which"):
        Study.from_dict({**JOB, "evaluate": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atack": {}}, r"unknown key 'atack' \(did you mean 'attack'"),
        ({"common": {"modle": "lenet"}}, r"unknown key in common 'modle' \(did you mean 'model'"),
        ({"fp": {"seed": 3}}, "fp: the study sets seed itself"),
        ({"fp": {"epochs": 0}}, "fp: epochs: wanted at least 1, or weights to use"),
        ({"victims": {}}, "victims: wanted at least one"),
        ({"victims": {"fp": {"method": "qat"}}}, "victims: wanted names of folders"),
        ({"victims": {"a/b": {"method": "qat"}}}, "victims: wanted the name of a folder"),
        ({"victims": {"..": {"method": "qat"}}}, "victims: wanted the name of a folder"),
        ({"victims": {1: {"method": "qat"}}}, "victims: wanted the name of a folder"),
        ({"fp": {"method": "qat"}}, "fp: method: wanted fp, got"),
        ({"victims": {"plain": {}}}, "plain: method"),
        ({"victims": {"plain": {"method": "fp"}}}, "plain: "),
        ({"attack": {"clone": "alexnet"}}, "attack: clone: wanted one of lenet"),
        ({"attack": {"answers": ["all"]}}, "answer: wanted probs"),
        ({"attack": {"budgt": 3}}, r"unknown key in attack 'budgt' \(did you mean 'budget'"),
        ({"seeds": [0, 0]}, "seeds: wanted a list of different numbers"),
        ({"seeds": 3}, "seeds: wanted a list"),
    ],
)
def test_bad_jobs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Study.from_dict({**JOB, **change})


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_shipped_jobs_are_valid(name):
    job = Study.from_dict(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()))
    assert job.victims["qat"]["method"] == "qat"
    assert {"knockoff", "knockoff:reading=label"} <= set(job.grid.attacks)


def test_a_missing_query_set_is_reported_before_training(tmp_path, capsys):
    file = tmp_path / "job.yaml"
    attack = {**JOB["attack"], "query_set": "folder", "query_root": str(tmp_path / "nothing")}
    file.write_text(yaml.safe_dump({**JOB, "attack": attack}))
    assert divqat("run", "--config", file, "--out", tmp_path / "out") == 1
    assert "transfer set 'folder' was not found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
