import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from divqat import cli, commands, pipeline, steps
from divqat.files import read_json
from divqat.job import Job
from divqat.options import ConfigError

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
    """A whole job that was never interrupted."""
    out = tmp_path_factory.mktemp("job")
    (out / "job.yaml").write_text(yaml.safe_dump(JOB, sort_keys=False))
    assert divqat("run", "--config", out / "job.yaml", "--out", out / "out") == 0
    return out


def test_run_does_everything(job, capsys):
    out = job / "out"
    result = read_json(out / "result.json")
    assert [victim["name"] for victim in result["victims"]] == ["qat", "divqat"]
    for victim in result["victims"]:
        assert set(victim["attacks"]) == {"probs", "label", "top2"}
        assert victim["deterministic"] and victim["distributions"]
        assert victim["int8_layers"] == 5 and victim["float_layers"] == 0
    assert result["seconds"] > 0 and result["query_budget"] == 300
    assert "divqat run --config" in result["command"]
    assert "data:image/png;base64" in (out / "report.html").read_text()
    assert (out / "seed0" / "divqat" / "attack-label" / "transfer.pt").is_file()
    assert divqat("report", out) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")


def test_finished_job_trains_and_asks_nothing(job, capsys, monkeypatch):
    for name in ("export_onnx", "verify", "predict"):
        monkeypatch.setattr(steps, name, None)
    assert divqat("run", "--config", job / "job.yaml", "--out", job / "out") == 0
    shown = capsys.readouterr().out
    assert "| qat " in shown and "| divqat " in shown
    assert shown.rstrip().endswith("report.html")


def test_killed_job_goes_on_to_the_same_result(job, tmp_path):
    """Killed in an attack; what comes before it is taken from a job that was never interrupted."""
    shutil.copytree(job / "out", tmp_path / "out")
    for name in ("result.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    seed = tmp_path / "out" / "seed0"
    for folder in (seed / "divqat", *seed.glob("qat/attack-*")):
        shutil.rmtree(folder)
    command = [sys.executable, "-m", "divqat", "run", "--config", str(job / "job.yaml")]
    command += ["--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob("out/seed0/qat/attack-*/transfer.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert divqat("run", "--config", job / "job.yaml", "--out", tmp_path / "out") == 0
    ours, theirs = (
        read_json(folder / "out" / "result.json")["victims"] for folder in (tmp_path, job)
    )
    assert ours == theirs


def test_what_a_kill_left_behind_is_no_result(job, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(job / "out", out)
    (out / "result.json").unlink()
    seed = out / "seed0"
    for folder in (seed, seed / "fp", seed / "qat" / "attack-probs"):
        for name in (".divqat-0123abcd-1-0123abcd-xyz.tmp", ".summary-abc.json", "mine.json"):
            (folder / name).write_text("{")
    monkeypatch.setattr(steps, "predict", None)
    assert divqat("run", "--config", job / "job.yaml", "--out", out) == 0
    ours, theirs = (read_json(folder / "result.json") for folder in (out, job / "out"))
    assert ours["seconds"] == theirs["seconds"] and ours["victims"] == theirs["victims"]


def test_other_queries_of_the_same_name_are_noticed(job, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(job / "out", out)
    load = steps.AttackConfig.queries
    monkeypatch.setattr(steps.AttackConfig, "queries", lambda *args: load(*args).roll(1, 0))
    assert divqat("run", "--config", job / "job.yaml", "--out", out) == 1
    assert "attack-probs holds another attack (images: " in capsys.readouterr().err


READ = {
    "run": ("fp/summary", "qat/verify", "qat/answers", "qat/attack-probs/summary"),
    "report": ("../result", "fp/summary", "qat/metrics.csv", "qat/layers"),
}


@pytest.mark.parametrize("command", READ)
def test_a_changed_figure_is_noticed_before_it_is_used(job, tmp_path, capsys, command):
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
    monkeypatch.setattr(pipeline._Runner, "victim", lambda *args: shutil.rmtree(out, True))
    assert divqat("run", "--config", job / "job.yaml", "--out", out) == 1
    assert f"{out} was deleted, moved or replaced" in capsys.readouterr().err
    assert not out.exists()


def test_job_of_other_settings_is_refused(job, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**JOB, "fp": {"epochs": 3}}))
    assert divqat("run", "--config", file, "--out", job / "out") == 1
    assert "fp.epochs: 2 -> 3" in capsys.readouterr().err


def test_finished_job_may_be_moved(job, tmp_path, monkeypatch):
    (job / "out").rename(job / "moved")
    monkeypatch.setattr(steps, "predict", None)
    monkeypatch.chdir(job)
    command = ["run", "--config", "job.yaml", "--out", "moved", "--data-root", tmp_path]
    assert divqat(*command, "--device", "cpu") == 0
    (job / "moved").rename(job / "out")


@pytest.mark.parametrize("command", ["run", "study"])
def test_the_device_flag_is_that_of_the_attacks_too(command, tmp_path, monkeypatch):
    made = []

    def stop(settings, *args, **kwargs):
        made.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_job", stop)
    monkeypatch.setattr(commands, "run_study", stop)
    file = tmp_path / "job.yaml"
    section = "attack" if command == "run" else "evaluate"
    data = {"victims": {"qat": {"method": "qat"}}, section: {"query_set": "noise"}}
    file.write_text(yaml.safe_dump(data))
    config = ["--config", file] if command == "run" else [file]
    assert divqat(command, *config, "--out", tmp_path, "--device", "cuda:7") == 130
    attacks = made[0].attacker(0) if command == "run" else made[0].grid
    assert made[0].training("qat", 0, tmp_path).device == attacks.device == "cuda:7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atack": {}}, r"unknown key 'atack' \(did you mean 'attack'"),
        ({"common": {"modle": "lenet"}}, r"unknown key in common 'modle' \(did you mean 'model'"),
        ({"fp": {"seed": 3}}, "fp: the job sets seed itself"),
        ({"fp": {"epochs": 0}}, "fp: epochs: wanted at least 1, or weights that are taken"),
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
        Job.from_dict({**JOB, **change})


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_shipped_jobs_are_valid(name):
    job = Job.from_dict(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()))
    assert job.victims["qat"]["method"] == "qat"
    assert {"probs", "label"} <= set(job.answers)


def test_missing_queries_are_known_before_training(tmp_path, capsys):
    file = tmp_path / "job.yaml"
    attack = {**JOB["attack"], "query_set": "folder", "query_root": str(tmp_path / "nothing")}
    file.write_text(yaml.safe_dump({**JOB, "attack": attack}))
    assert divqat("run", "--config", file, "--out", tmp_path / "out") == 1
    assert "transfer set 'folder' was not found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
