"""The last lines of every command: where the results are, and what to run next."""

import shlex
from types import SimpleNamespace

import pytest
from evaluations import fake_evaluation

from divqat._util.progress import duration
from divqat.cli import commands, main
from divqat.cli.ending import Pace
from divqat.cli.parser import build_parser

CASES = {
    "train": "train --out {}/fp",
    "train int8": "train --out {}/qat --method qat --teacher {}/fp --trust nets:net",
    "export": "export {}/qat --data-root {}",
    "verify": "verify {}/qat",
    "sensitivity": "sensitivity {}/qat",
    "attack": "attack --victim {}/qat",
    "evaluate": "evaluate --victim {}/qat --out {}/evaluation",
    "run": "run --config {}/study.yaml --out {}/study",
    "study": "study {}/study.yaml --out {}/study",
    "report": "report {}/study",
    "ownership": "ownership {}/fp --secret {}/qat",
    "info": "info",
}


@pytest.fixture
def nothing_is_computed(tmp_path, monkeypatch):
    """Commands find results instead of making them, in files with names that need quotes."""
    home = tmp_path / "my runs"
    for name in ("fp", "qat", "evaluation", "study"):
        (home / name).mkdir(parents=True)
        (home / name / "report.html").touch()
    (home / "qat" / "model.onnx").touch()
    (home / "qat" / "verify.json").touch()
    (home / "qat" / "sensitivity.json").touch()
    (home / "qat" / "attack-probs").mkdir()
    (home / "study.yaml").write_text("victims: {qat: {method: qat}}\nevaluate: {}\n")
    config = commands.TrainConfig(method="qat", teacher=str(home / "fp"))

    def load_run(folder):
        return SimpleNamespace(
            folder=home / "qat", config=config, model=None, splits=lambda root: None
        )

    row = {"text": "text", "least_agreement": 1.0}
    row |= {"victim_accuracy": 0.9, "queries": 5, "accuracy": 0.5, "fidelity": 0.5}
    result = fake_evaluation()
    for module, name, value in (
        (commands, "load_run", load_run),
        (commands.training, "train", lambda *_, **__: None),
        (commands, "export_run", lambda *_: row),
        (commands, "verify_run", lambda *_: row),
        (commands, "sensitivity_run", lambda *_: row),
        (commands, "attack_run", lambda *_, **__: row),
        (commands, "load_subjects", lambda *_, **__: ([], None, "")),
        (commands, "run_grid", lambda *_, **__: result),
        (commands, "run_study", lambda *_, **__: result),
        (commands, "write_report", lambda out: None),
        (commands, "Victim", lambda *_, **__: None),
        (commands, "check", lambda *_, **__: None),
        (commands, "sentence", lambda *_, **__: "text"),
        (commands, "write_verdict", lambda *_, **__: home / "study" / "report.html"),
    ):
        monkeypatch.setattr(module, name, value)
    return home


@pytest.mark.parametrize("case", CASES)
def test_a_command_ends_with_its_results_and_the_next_command(case, nothing_is_computed, capsys):
    home = nothing_is_computed
    words = [word.replace("{}", str(home)) for word in CASES[case].split()]
    assert main(words) == 0
    results, following = capsys.readouterr().out.splitlines()[-2:]
    assert results.startswith("results  ") and following.startswith("next     ")
    path = results.removeprefix("results  ")
    assert path.startswith(str(home)) or case == "info"
    assert commands.Path(path).exists()
    program, *arguments = shlex.split(following.removeprefix("next     "))
    if program == "python3":
        assert arguments == ["-m", "webbrowser", path]
        return
    assert program == "divqat"
    args = build_parser().parse_args(arguments)
    if case == "train int8":
        assert args.trust == ["nets:net"]
    if case == "export":
        assert args.data_root == str(home)


def test_every_command_has_a_case():
    (choices,) = (a.choices for a in build_parser()._actions if a.choices)
    assert {case.split()[0] for case in CASES} == set(choices)


def test_a_training_says_how_long_it_will_take(capsys):
    pace = Pace(clock=iter([0.0, 5.0, 15.0, 22.0, 30.0]).__next__)
    for line in ("warning: text", "epoch  1/12  loss 1", "[seed 0 qat] epoch 11/12  loss 1"):
        pace(line)
    pace("epoch 12/12  loss 1")
    assert capsys.readouterr().out.splitlines() == [
        "warning: text",
        "epoch  1/12  loss 1  2 min left",
        "[seed 0 qat] epoch 11/12  loss 1  7 s left",
        "epoch 12/12  loss 1",
    ]


def test_durations():
    assert [duration(x) for x in (3.2, 89, 90, 5300, 9000)] == [
        "3 s",
        "89 s",
        "2 min",
        "88 min",
        "2.5 h",
    ]
