import re
from dataclasses import replace

import pytest
import yaml

from divqat import cli
from divqat._util.settings import ConfigError
from divqat.cli.commands import _study_file
from divqat.cli.parser import build_parser
from divqat.evaluate import Evaluation
from divqat.evaluate.tables import side_effects_table
from divqat.experiments import tasks
from divqat.experiments.study import Study

pytestmark = pytest.mark.slow

STUDY = {
    "seeds": [0],
    "common": {"dataset": "digits", "model": "lenet", "batch_size": 256, "threads": 1},
    "fp": {"epochs": 2},
    "victims": {
        "teacher": {"method": "nasty", "epochs": 1},
        "qat": {"method": "qat", "epochs": 1, "lr": 0.01},
        "nasty-ptq": {"method": "ptq", "teacher": "teacher", "epochs": 1},
    },
    "subjects": ["fp", "qat", "nasty-ptq"],
    "evaluate": {
        "query_set": "noise",
        "query_limit": 200,
        "clones": ["lenet"],
        "epochs": 1,
        "threads": 1,
        "adversarial_images": 60,
    },
}
BUDGETED = {"method": "divqat", "accuracy_budget": 0.5}


def divqat(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study."""
    out = tmp_path_factory.mktemp("study")
    (out / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    assert divqat("study", out / "study.yaml", "--out", out / "out") == 0
    return out


def test_study_trains_deploys_and_evaluates(done):
    result = Evaluation.load(done / "out" / "evaluation.json")
    methods = {row.victim: row.method for row in result.released}
    assert methods == {"fp": "fp", "qat": "qat", "nasty-ptq": "nasty-ptq"}
    assert len(result.cells) == 6
    assert [row.victim for row in result.side_effects] == list(methods)
    assert all(row.adversarial[0].images == 60 for row in result.side_effects)
    assert "int8" in result.deployed and "full-precision" in result.deployed
    assert (done / "out" / "seed0" / "nasty-ptq" / "model.onnx").is_file()
    assert not (done / "out" / "seed0" / "teacher" / "model.onnx").exists()


def test_the_report_shows_the_settings_of_each_training(done):
    text = (done / "out" / "report.md").read_text()
    rows = dict(re.findall(r"^\| (\S+) +\| (?:fp|qat|ptq) +\| (\S.*?) *\|$", text, re.M))
    assert rows == {"fp": "epochs=2", "qat": "lr=0.01"}  # nasty-ptq has the most common settings
    assert re.search(r"^\| nasty-ptq \| ptq +\| +\|$", text, re.M)


def test_a_finished_study_is_kept_and_can_be_extended(done, monkeypatch):
    before = Evaluation.load(done / "out" / "evaluation.json")
    data = {**STUDY, "evaluate": {**STUDY["evaluate"], "budgets": [50, 200]}}
    (done / "more.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    trained = []
    train = tasks.train
    monkeypatch.setattr(tasks, "train", lambda *a, **k: trained.append(train(*a, **k)))
    assert divqat("study", done / "more.yaml", "--out", done / "out") == 0
    after = Evaluation.load(done / "out" / "evaluation.json")
    assert len(after.cells) == 12
    kept = [cell for cell in after.cells if cell.budget == 200]
    assert kept == before.cells


def test_parallel_jobs_give_the_same_results(done, tmp_path, capfd):
    short = ["fp", "qat"]
    data = {**STUDY, "seeds": [0, 1], "victims": {"qat": STUDY["victims"]["qat"]}}
    data["subjects"] = short
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    assert divqat("study", tmp_path / "study.yaml", "--out", tmp_path / "out", "--jobs", 2) == 0
    result = Evaluation.load(tmp_path / "out" / "evaluation.json")
    cells = [(cell.seed, cell.victim) for cell in result.cells if cell.attack == "knockoff"]
    assert cells == [(seed, victim) for seed in range(2) for victim in short]
    before = Evaluation.load(done / "out" / "evaluation.json")
    theirs = [c for c in before.cells if c.victim in short and c.budget == 200]
    ours = [cell for cell in result.cells if cell.seed == 0]
    assert [replace(cell, seconds=0) for cell in ours] == [replace(c, seconds=0) for c in theirs]
    lines = capfd.readouterr().out.splitlines()  # includes those of the processes
    assert sum(line.startswith("[seed 1 qat] test accuracy") for line in lines) == 1
    assert sum(line.startswith("report: ") for line in lines) == 1


def test_flags_override_the_file_of_a_study(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | {"evaluate": {"query_root": "a", "epochs": 2}}))
    flags = ["--seeds", "5", "--data-root", "b", "--query-root", "c", "--device", "cpu"]
    args = build_parser().parse_args(["study", str(file), *flags, "--out", "d"])
    data = _study_file(args)
    assert data["seeds"] == [5]
    assert data["common"] == STUDY["common"] | {"data_root": "b", "device": "cpu"}
    assert data["evaluate"] == {"query_root": "c", "epochs": 2, "device": "cpu"}


def test_evaluate_takes_run_folders_and_files(done, tmp_path, capsys):
    run = done / "out" / "seed0" / "qat"
    settings = ["--query-set", "noise", "--query-limit", 50, "--clones", "lenet", "--epochs", 1]
    settings += ["--seeds", 1, "--threads", 1, "--out", tmp_path]
    victims = ["--victim", run, "--victim", f"file={run / 'model.onnx'}"]
    assert divqat("evaluate", *victims, *settings) == 0
    result = Evaluation.load(tmp_path / "evaluation.json")
    cells = result.cells
    ours, theirs = ([(c.attack, c.curve) for c in cells if c.victim == v] for v in ("qat", "file"))
    assert ours == theirs  # a run is attacked as its export
    run_row, file_row = result.side_effects
    assert run_row.ece == file_row.ece and run_row.adversarial and not file_row.adversarial
    shown = capsys.readouterr().out
    assert side_effects_table(result).markdown() in shown
    assert "| qat " in shown and "ok    query budgets are respected" in shown
    assert divqat("report", tmp_path) == 0
    assert divqat("evaluate", "--victim", run / "model.onnx", *settings) == 2
    assert (
        "dataset: wanted one for all victims, got none: pass --dataset, as no run folder names it"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": ["alien"]}, r"subjects: wanted some of fp, teacher, .*, got \['alien'\]"),
        ({"evaluate": {"seeds": 3}}, "evaluate: the study sets seeds itself"),
        ({"evaluate": {"epoch": 3}}, r"evaluate 'epoch' \(did you mean 'epochs'"),
        ({"evaluate": {"attacks": ["alien"]}}, "unknown attack 'alien'"),
        ({"evaluate": {"defenses": ["alien"]}}, "unknown defense 'alien'"),
        ({"attack": {}}, "attack: wanted either it or evaluate, of which it is"),
        ({"attacks": {}}, "unknown key 'attacks'"),
        (
            {"victims": {"divqat": {**BUDGETED, "reference": "qat"}, "qat": {"method": "qat"}}},
            "divqat: reference: wanted an earlier qat victim, got 'qat'",
        ),
        ({"common": {"reference": "qat"}}, "common: the study sets reference itself"),
    ],
)
def test_bad_studies_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Study.from_dict({**STUDY, **change})


def test_the_reference_has_the_same_seed(tmp_path):
    victims = {"plain": {"method": "qat"}, "divqat": {**BUDGETED, "reference": "plain"}}
    config = Study.from_dict({"victims": victims}).training("divqat", 3, tmp_path)
    assert config.reference == str(tmp_path / "seed3" / "plain")
