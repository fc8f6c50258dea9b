"""The tables of docs/results.md are those of the committed results, and its pages are complete."""

import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from testing import randn

from divqat.attacks import ATTACKS
from divqat.cli import main
from divqat.defenses import DEFENSES
from divqat.evaluate import Evaluation
from divqat.evaluate.table import percent
from divqat.evaluate.tables import (
    attacks_table,
    budgets_table,
    defenses_table,
    main_table,
    side_effects_table,
)
from divqat.experiments.study import Study
from divqat.models import build

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
JOBS = ("fashion-mnist",)  # the others are benchmarks: tests/test_bench_step.py
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_shipped_configurations_are_valid():
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert files
    for file in files:
        data = yaml.safe_load(file.read_text())
        Study.from_dict(data)
        assert f"configs/{file.name}" in PAGE


@pytest.mark.parametrize("name", JOBS)
def test_the_tables_are_those_of_the_committed_results(name):
    """Of the jobs, whose results are older than their being studies: a row for each victim."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert result["command"] in PAGE
    victims = {}
    for victim in result["victims"]:
        victims.setdefault(victim["name"], []).append(victim)
    for name, runs in victims.items():
        cells = [percent(run[key] for run in runs) for key in ("accuracy_onnx", "argmax_agreement")]
        cells += [
            percent(run["attacks"][a]["accuracy"] for run in runs) for a in ("probs", "label")
        ]
        row = rf"^\| {name} .*\| +" + r" \| +".join(map(re.escape, cells)) + r" \|"
        assert re.search(row, PAGE, re.MULTILINE), row


@pytest.mark.slow
def test_a_network_of_ones_own_is_defended_as_the_page_says(tmp_path, monkeypatch):
    """Its commands, but on digits and short."""
    page = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
    code, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # the network comes first
    (tmp_path / "my_nets.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = build("my_nets:my_net", in_channels=1, num_classes=10, image_size=8)
    torch.save(network.state_dict(), "my_net.pt")
    lines = re.findall(r"^    (divqat [a-z]+.*)$", page, re.MULTILINE)
    for line in lines:
        for long, short in {
            "--dataset folder --data-root pictures": "--dataset digits",
            "--epochs 10": "--epochs 1 --threads 1",
            "--query-set openclipart": "--query-set noise --query-limit 60 --epochs 1 --threads 1",
            "--out runs/evaluation": "--seeds 1 --epsilons --out runs/evaluation",
        }.items():
            line = line.replace(long, short)
        assert main(shlex.split(line)[1:]) == 0
    assert len(lines) == 6
    assert (tmp_path / "runs" / "evaluation" / "report.html").is_file()


@pytest.mark.slow
def test_the_loop_with_an_accuracy_budget_runs(capsys):
    """That of the page: with no loss of accuracy its last third is not repeated, else twice."""
    page = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = (block for block in blocks if "AccuracyBudget" in block)
    torch.manual_seed(0)
    float_model = build("lenet", in_channels=1, num_classes=10, image_size=8).eval()
    loader = [(randn(20, 1, 8, 8).clamp(-1, 1), torch.arange(20) % 10)]
    for found, weight in ((0.895, 0.8), (0.5, 0.2)):
        names = {"float_model": float_model, "loader": loader, "reference": 0.9}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is not met
            exec(code, {**names, "validate": lambda model, found=found: found}, names)
        assert names["budget"].finished
        assert float(names["misdirection"].weight) == pytest.approx(weight)
        assert f"{found:.2%}" in capsys.readouterr().out


def test_every_attack_and_defense_is_described():
    page = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    for name in (*ATTACKS, *DEFENSES):
        assert f"`{name}`" in page


@pytest.mark.slow
def test_the_studies_are_those_of_the_committed_results():
    for name, tables in {
        "attacks": [lambda result: budgets_table(result, "qat")],
        "data-free": [lambda result: budgets_table(result, "qat")],
        "defenses": [defenses_table],
        "combination": [defenses_table],
        "misdirection-strong": [attacks_table, side_effects_table],
        "misdirection-strong-shadow": [attacks_table],
        "misdirection-strong-own": [attacks_table],
        "misdirection-strong-photos": [attacks_table],
        "misdirection-strong-small": [attacks_table],
        "misdirection-sweep": [main_table],
        "digits": [main_table],
        "baselines": [main_table, side_effects_table],
        "resnet20": [main_table, side_effects_table],
    }.items():
        result = Evaluation.load(RESULTS / name / "evaluation.json")
        for table in tables:
            assert table(result).markdown() in PAGE, f"paste the table of {name} into results.md"
        # there, the seeds of one victim stand in the shell's braces
        assert "--victim=" in result.command or result.command in PAGE


def test_the_summary_is_that_of_the_committed_results():
    result = Evaluation.load(RESULTS / "misdirection-strong" / "evaluation.json")
    assert main_table(result).markdown() in PAGE
    assert result.command in PAGE
