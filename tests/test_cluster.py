"""A study on the workers of a dask scheduler."""

import json
import subprocess
import sys

import pytest
import yaml

from divqat import cli
from divqat.evaluate import Evaluation

pytestmark = pytest.mark.slow

STUDY = {
    "seeds": [0],
    "common": {"dataset": "digits", "model": "lenet", "batch_size": 256, "threads": 1},
    "fp": {"epochs": 1},
    "victims": {"qat": {"method": "qat", "epochs": 2, "lr": 0.01}},
    "subjects": ["fp"],  # an export takes longer than all of this
    "evaluate": {
        "query_set": "noise", "query_limit": 100, "clones": ["lenet"], "epochs": 1, "threads": 1,
        "defenses": ["none", "rounding"], "adversarial_images": 50,
    },
}  # fmt: skip
# Preloaded by the workers: kills one of them in the middle of a training.
KILLER = """
import os
from divqat.train import run

def write_checkpoint(folder, state, write=run.write_checkpoint):
    write(folder, state)
    if state["config"]["method"] == "qat" and state["epoch"] == 1:
        try:
            os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), 9)

run.write_checkpoint = write_checkpoint
"""


@pytest.fixture
def cluster(tmp_path):
    """The address of a scheduler with two workers."""
    file, preload = tmp_path / "scheduler.json", tmp_path / "killer.py"
    preload.write_text(KILLER.format(marker=str(tmp_path / "killed")))
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = ["worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--preload", preload]
    started = []
    try:
        for command in (scheduler, worker, worker):
            dask = [sys.executable, "-m", "dask", *command, "--scheduler-file", file]
            with open(tmp_path / f"log{len(started)}", "w") as log:
                started.append(subprocess.Popen(dask, stdout=log, stderr=log, cwd=tmp_path))
            while not file.exists():
                assert started[0].poll() is None, (tmp_path / "log0").read_text()
        yield json.loads(file.read_text())["address"]
    finally:
        for process in started:
            process.kill()
            process.wait()


def measured(folder):
    """The results without times, dates and the command, which differ from run to run."""
    result = Evaluation.load(folder / "evaluation.json").to_dict()
    for key in ("date", "command"):
        del result[key]
    for rows, key in (("cells", "seconds"), ("released", "microseconds")):
        for row in result[rows]:
            del row[key]
    return result


def test_a_cluster_that_loses_a_worker_gives_the_same_results(tmp_path, cluster):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    command = ["study", str(tmp_path / "study.yaml"), "--out"]
    assert cli.main([*command, str(tmp_path / "there"), "--cluster", cluster]) == 0
    assert (tmp_path / "killed").exists()
    assert cli.main([*command, str(tmp_path / "here")]) == 0
    assert measured(tmp_path / "there") == measured(tmp_path / "here")
    logs = "".join((tmp_path / f"log{worker}").read_text() for worker in (1, 2))
    assert logs.count("/qat: resuming after epoch 1 of 2") == 1  # and does not start over
    for seed in STUDY["seeds"]:  # the attacks ran on the workers
        assert logs.count(f"[seed {seed} fp] rounding <- knockoff 100 lenet") == 1


def test_jobs_and_cluster_exclude_each_other(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    command = ["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--cluster", "tcp://127.0.0.1:1", "--jobs", "2"]) == 2
    assert "jobs: wanted 1 with a cluster" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
