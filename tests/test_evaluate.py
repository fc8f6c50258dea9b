"""The report of a study: what is measured, what lies beside it, and what is wrong with it."""

import base64
import re
import shutil
import sys
from dataclasses import replace

import pytest
from evaluations import cell, fake_evaluation, write_study

from divqat._util.files import read_json, write_json
from divqat.evaluate import Evaluation, curves, write_report
from divqat.evaluate.audits import audits
from divqat.evaluate.table import Table, spread
from divqat.evaluate.tables import main_table


def test_an_evaluation_survives_json(tmp_path):
    result = fake_evaluation()
    result.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == result


def test_an_evaluation_must_be_complete(tmp_path):
    path = tmp_path / "evaluation.json"
    with pytest.raises(FileNotFoundError, match="divqat run"):
        Evaluation.load(path)
    data = fake_evaluation().to_dict()
    del data["cells"][0]["accuracy"]
    write_json(path, data)
    with pytest.raises(ValueError, match=r"not a divqat evaluation: .*accuracy"):
        Evaluation.load(path)
    write_json(path, {})
    with pytest.raises(ValueError, match="released"):
        Evaluation.load(path)


@pytest.mark.parametrize("name", ["../../x", "/x"])
def test_an_evaluation_does_not_say_what_is_read_elsewhere(tmp_path, name):
    result = fake_evaluation()
    rows = [replace(result.released[0], victim=name), *result.released[1:]]
    replace(result, released=rows).save(tmp_path / "evaluation.json")
    with pytest.raises(ValueError, match="wanted the name of a folder"):
        write_report(tmp_path)


def test_spread():
    assert spread([0.5, 0.7], scale=100) == "60.0 ± 14.1"
    assert spread([0.5, None], scale=100) == "50.0"
    assert spread([None]) == "–"


def test_main_table_shows_all_numbers():
    lines = main_table(fake_evaluation()).markdown().splitlines()
    assert len({len(line) for line in lines}) == 1  # columns line up
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    row = dict(zip(cells[0], cells[3], strict=True))
    assert row == {
        "Victim": "divqat",
        "Defense": "none",
        "Victim acc": "91.8 ± 0.4",
        "Released acc": "91.8 ± 0.4",
        "L1 queries": "0.00 ± 0.00",
        "Clone soft": "41.2 ± 0.8",
        "Clone hard": "38.7 ± 0.8",
        "Best of all": "41.2 ± 0.8",
        "Fidelity": "42.2 ± 0.8",
        "Best attack": "knockoff",
    }


def test_table_escapes():
    table = Table(["x", "y"], [["a <|>", "1"]])
    assert "<td>a &lt;|&gt;</td>" in table.html() and r"a \<\|\>" in table.markdown()


def failed(result):
    return {audit.name for audit in audits(result) if not audit.ok}


SHUFFLED = "answers to other images teach nothing"  # nobody tried


def test_audits_of_a_sound_evaluation():
    # DivQAT costs 0.7 points and smooth does not beat the floor: both must be said.
    assert failed(fake_evaluation()) == {
        SHUFFLED,
        "divqat behind none keeps the accuracy of qat",
        "smooth behind none beats showing labels only",
    }
    texts = [str(audit) for audit in audits(fake_evaluation())]
    line = "CHECK divqat behind none keeps the accuracy of qat: -0.70 points, -0.5 allowed"
    assert line in texts


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"deterministic": None}, "victims are deterministic, in eval mode"),
        ({"distributions": False}, "answers are distributions"),
        ({"agreement": 0.98}, "the deployed model is the trained one"),
        ({"agreement": None}, "the deployed model is the trained one"),
    ],
)
def test_audits_find_what_is_wrong_with_a_victim(change, name):
    result = fake_evaluation()
    rows = [replace(result.released[0], **change), *result.released[1:]]
    assert name in failed(replace(result, released=rows)) - failed(result)


def test_audits_find_what_is_wrong_with_an_evaluation():
    result = fake_evaluation()
    assert "seeds" in failed(fake_evaluation(seeds=2))
    others = [replace(row, method="other") for row in result.released]
    name = "a control without a defense is in the table"
    assert name in failed(replace(result, released=others))
    soft = [c for c in result.cells if c.reading != "label"]
    assert "attacked from soft and from hard answers" in failed(replace(result, cells=soft))
    over = [replace(result.cells[0], queries=1001), *result.cells[1:]]
    assert "query budgets are respected" in failed(replace(result, cells=over))
    weak = [replace(c, accuracy=0.12, holdout_accuracy=0.12) for c in result.cells]
    assert "the attack works on an undefended victim" in failed(replace(result, cells=weak))
    seen = replace(result, overlap={"queries in train": 1, "queries in test": 0})
    assert "queries are not the victim's images" in failed(seen)


def test_audits_of_nothing():
    nothing = fake_evaluation(released=[], cells=[])
    assert failed(nothing) >= {"seeds", "a control without a defense is in the table"}


@pytest.fixture(scope="module")
def study(tmp_path_factory, painted):
    pytest.importorskip("matplotlib")
    folder = write_study(tmp_path_factory.mktemp("study"), fake_evaluation())
    write_report(folder)
    return folder


PLOTS = ("answers", "attacks", "clones", "front", "layers", "training")


def test_html_report_is_self_contained(study):
    html = (study / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == len(PLOTS)
    pictures = [base64.b64decode(picture) for picture in pictures]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 1000 for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)|https?://', html)
    assert "Warnings" not in html
    for wanted in ("41.2 ± 0.8", "Label-only floor", "divqat run --config", "torch"):
        assert wanted in html


def test_markdown_report_says_the_same_and_shows_plots(study):
    text = (study / "report.md").read_text(encoding="utf-8")
    assert main_table(fake_evaluation()).markdown() in text
    assert "CHECK divqat behind none keeps the accuracy of qat" in text
    plots = re.findall(r"\]\((plots/\w+\.png)\)", text)
    assert sorted(plots) == [f"plots/{name}.png" for name in PLOTS]
    assert all((study / plot).is_file() for plot in plots)


def test_deployment_is_that_of_the_file_as_it_is_attacked(study):
    text = (study / "report.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| divqat +\| +94\.0 .*", text, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    # validation, as trained, int8 and agreement (the precise ones, as it is attacked), layers
    assert cells == [
        "divqat", "94.0 ± 0.0", "93.0 ± 0.0", "91.8 ± 0.4", "99.8 ± 0.0", "9", "0",
    ]  # fmt: skip


def test_the_report_shows_the_warnings(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "study")
    summary = folder / "seed0" / "qat" / "summary.json"
    write_json(summary, {**read_json(summary), "warnings": ["it fell <down>"]})
    write_report(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    shown = r"it fell \<down\>"
    assert text.index("## Warnings") < text.index(shown) < text.index("## Results")
    assert f"| qat      | seed0  | {shown} |" in text


def test_report_of_a_study_that_has_only_begun(tmp_path):
    pytest.importorskip("matplotlib")
    bare = fake_evaluation(seeds=1, cells=[])
    bare.save(tmp_path / "evaluation.json")
    assert write_report(tmp_path) == tmp_path / "report.html"
    replace(bare, released=[]).save(tmp_path / "evaluation.json")
    write_report(tmp_path)


def test_the_way_of_a_budget_is_shown(tmp_path, painted):
    pytest.importorskip("matplotlib")
    path = [dict(share=s, validation_accuracy=0.9 - s / 10, misled=s) for s in (1.0, 0.5, 0.0)]
    budget = dict(path=path, share=0.5, reference=0.9, points=5.0)
    assert curves.budget_path(budget, tmp_path / "budget.png").stat().st_size > 1000


def test_report_without_matplotlib(tmp_path, monkeypatch):
    fake_evaluation().save(tmp_path / "evaluation.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"divqat\[report\]"):
        write_report(tmp_path)


def test_a_cell_knows_what_the_best_epoch_would_add():
    found = cell(0, "a", "knockoff", 0.5)
    assert replace(found, curve=[0.7, 0.5]).gain == pytest.approx(0.2)
