"""An evaluation on the toy problem; the parts of a grid by themselves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import toy_images, toy_splits, toy_victim

from divqat._util.settings import ConfigError
from divqat.data import to_float
from divqat.evaluate import Evaluation, Grid, Subject, assessment, evaluate
from divqat.evaluate.audits import audits
from divqat.evaluate.cells import Curve
from divqat.evaluate.results import HARD, SOFT, best_of, reads
from divqat.evaluate.specs import make_attack, split_spec
from divqat.evaluate.subject import CachedModel, image_keys, overlaps
from divqat.evaluate.tables import attacks_table, floor, main_table, released_table

pytestmark = pytest.mark.slow

ATTACKS = ("knockoff", "knockoff:reading=label", "knockoff:reading=shuffled")
QUICK = {"query_limit": 300, "query_set": "noise", "clones": ("lenet",), "threads": 1}
GRID = Grid(attacks=ATTACKS, budgets=(50, 300), epochs=2, seeds=2, **QUICK)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """An evaluation of one victim, and where it lies."""
    out = tmp_path_factory.mktemp("evaluation")
    said = []
    result = evaluate([Subject("qat", model, "qat")], toy_splits(), GRID, out, log=said.append)
    return result, out, said


def test_every_cell_is_there(done):
    result, out, said = done
    cells = {(c.seed, c.attack, c.budget, c.clone) for c in result.cells}
    assert cells == {(s, a, b, "lenet") for s in (0, 1) for a in ATTACKS for b in (50, 300)}
    assert all(c.queries == c.budget and len(c.curve) == 2 for c in result.cells)
    assert all(c.gain == max(c.curve) - c.accuracy for c in result.cells)
    # the side effects of each seed; each attack, and after it how many are left
    assert len(said) == 2 + 2 + len(cells) + len(cells) - 1
    assert result == Evaluation.load(out / "evaluation.json")
    assert not list(out.glob("cells/**/*.pt"))  # checkpoints are gone
    (row,) = {(r.victim, r.defense, r.l1_queries, r.top1_kept) for r in result.released}
    assert row == ("qat", "none", 0, 1)


def test_finished_cells_are_kept(model, done, monkeypatch):
    result, out, _ = done

    def refuse(*_):
        raise AssertionError("nothing was left to do")

    monkeypatch.setattr(assessment, "run_attack", refuse)
    monkeypatch.setattr(assessment, "defend", refuse)
    again = evaluate([Subject("qat", model, "qat")], toy_splits(), GRID, out, log=lambda line: None)
    assert again.cells == result.cells and again.released == result.released


def test_other_settings_and_other_victims_are_attacked_anew(done, tmp_path, monkeypatch):
    out = shutil.copytree(done[1], tmp_path / "out")
    attacked = []
    attack = assessment.run_attack
    monkeypatch.setattr(
        assessment, "run_attack", lambda a, *x, **k: attacked.append(a) or attack(a, *x, **k)
    )
    wider = Grid(attacks=(*ATTACKS, "knockoff:epochs=1"), budgets=(50,), epochs=2, seeds=2, **QUICK)
    same = Subject("qat", toy_victim(), "qat")
    evaluate([same], toy_splits(), wider, out, log=lambda line: None)
    assert [a.epochs for a in attacked] == [1, 1]  # the new attack, both seeds
    attacked.clear()
    other = Subject("qat", lambda images: same.model(images) * 2, "qat")
    evaluate([other], toy_splits(), wider, out, log=lambda line: None)
    assert len(attacked) == 8


def test_report_shows_tables_plots_and_audits(done):
    result, out, _ = done
    page = (out / "report.md").read_text()
    for table in (main_table(result), attacks_table(result), released_table(result)):
        assert table.markdown() in page
    assert {file.stem for file in (out / "plots").iterdir()} == {
        "front", "clones", "attacks", "budget", "answers",
    }  # fmt: skip
    assert "data:image/png;base64" in (out / "report.html").read_text()
    by_name = {audit.name: audit for audit in audits(result)}
    assert not by_name["seeds"].ok  # two
    assert by_name["query budgets are respected"].ok
    assert by_name["answers to other images teach nothing"].ok
    assert by_name["answers are distributions"].ok


def test_picks(done):
    result, _, _ = done
    cells = [c for c in result.cells if c.seed == 0 and c.budget == 300]
    soft, hard, control = cells
    assert [c.reading for c in cells] == [SOFT, HARD, "shuffled"]
    assert reads(SOFT)(cells) is soft and reads(HARD)(cells) is hard
    better = type(control)(**{**control.__dict__, "holdout_accuracy": 1.0})
    assert best_of([soft, hard, better]) is max(
        (soft, hard), key=lambda cell: cell.holdout_accuracy
    )
    assert best_of([better]) is None
    assert floor(result) == pytest.approx(
        sum(c.accuracy for c in result.cells if c.reading == HARD and c.budget == 300) / 2
    )


def test_attacker_chooses_without_the_test_set(done):
    result, _, _ = done
    cells = [c for c in result.cells if c.seed == 0 and c.budget == 300][:2]
    lucky = type(cells[0])(**{**cells[0].__dict__, "accuracy": 1.0, "holdout_accuracy": 0.1})
    honest = type(cells[1])(**{**cells[1].__dict__, "accuracy": 0.5, "holdout_accuracy": 0.2})
    assert best_of([lucky, honest]) is honest


def test_a_victim_alone_is_its_own_control(done):
    result = done[0]
    mine = Evaluation(**{**result.__dict__, "released": [
        type(row)(**{**row.__dict__, "method": "unknown"}) for row in result.released
    ]})  # fmt: skip
    assert mine.control == "qat" and floor(mine) == floor(result) is not None
    name = "a control without a defense is in the table"
    assert {a.name: a.ok for a in audits(mine)}[name]
    other = type(mine.released[0])(**{**mine.released[0].__dict__, "victim": "other"})
    both = Evaluation(**{**mine.__dict__, "released": [*mine.released, other]})
    assert both.control is None and floor(both) is None
    assert not {a.name: a.ok for a in audits(both)}[name]


def test_a_budget_beyond_the_query_set_is_known_before_any_work(model, tmp_path):
    for attack, message in (
        ("knockoff", "query_budget: wanted 1 to 300, the size of the query set, got 301"),
        ("smoothing:copies=2", "query_budget: wanted 2 to 600"),
        ("jbda:seeds=299", None),  # makes the rest itself
    ):
        grid = replace(
            GRID, attacks=(attack,), budgets=(300, 301 if "copies" not in attack else 601)
        )
        if message is None:
            grid.check(toy_splits(), 300)
            continue
        with pytest.raises(
            ConfigError, match=f"attack {attack}, budget {grid.budgets[1]}: {message}"
        ):
            evaluate([Subject("qat", model)], toy_splits(), grid, tmp_path)
        assert not list(tmp_path.glob("**/*"))


def test_one_subject_is_not_several(model, tmp_path):
    with pytest.raises(TypeError, match="subjects: wanted a sequence of Subject, got one"):
        evaluate(Subject("qat", model), toy_splits(), GRID, tmp_path)


def test_the_report_says_how_many_labeled_images_there_were(model, tmp_path):
    splits = toy_splits()  # 100 validation images, 200 are wanted
    grid = replace(GRID, attacks=("knockoff",), budgets=(50,), seeds=1)
    result = evaluate([Subject("qat", model)], splits, grid, tmp_path, log=lambda line: None)
    assert grid.holdout == 200 and result.grid["holdout"] == 100
    assert "most accurate on 100 labeled images" in (tmp_path / "report.md").read_text()


def test_names_must_differ(model, tmp_path):
    with pytest.raises(ValueError, match="subjects: wanted victims with different names"):
        evaluate([Subject("a", model)] * 2, toy_splits(), GRID, tmp_path)
    with pytest.raises(ValueError, match="subjects: wanted"):
        evaluate([], toy_splits(), GRID, tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("jbda", ("jbda", {})),
        (
            "a:x=1,y=0.5,z=true,w=none,v=label",
            ("a", {"x": 1, "y": 0.5, "z": True, "w": None, "v": "label"}),
        ),
        ("a:x=1e-3", ("a", {"x": 1e-3})),
    ],
)
def test_specs(text, wanted):
    assert split_spec(text) == wanted


@pytest.mark.parametrize("text", ["a:x", "a:x=", "a:=1", "a:x=1,x=2"])
def test_specs_that_are_none(text):
    with pytest.raises(ConfigError, match="wanted name:setting=value"):
        split_spec(text)


def test_attacks_by_name():
    defaults = {"epochs": 9, "batch_size": 7, "query_budget": 30_000}
    attack = make_attack("knockoff:epochs=3,lr=1", defaults)
    assert (attack.epochs, attack.lr, attack.batch_size) == (3, 1.0, 7)
    attack = make_attack("dfme", defaults)
    assert (attack.query_budget, attack.batch_size) == (30_000, 256)  # its own way to train
    with pytest.raises(ConfigError, match=r"unknown attack 'knockof' \(did you mean 'knockoff'"):
        make_attack("knockof", {})
    with pytest.raises(ConfigError, match=r"knockoff:epoch=3 'epoch' \(did you mean 'epochs'"):
        make_attack("knockoff:epoch=3", {})
    with pytest.raises(ConfigError, match="attacks: wanted no duplicates"):
        Grid(attacks=("knockoff", "knockoff"))


def test_remembered_answers_are_those_of_the_model(model):
    known, new = toy_images(40, seed=8)[0], toy_images(20, seed=9)[0]
    asked = []

    def counting(images):
        asked.append(len(images))
        return model(images)

    remembered = CachedModel(counting, known)
    assert sum(asked) == 40
    mixed = to_float(torch.cat([new[:3], known[5:9], new[3:]]))
    with torch.no_grad():
        torch.testing.assert_close(remembered(mixed), model(mixed))
        torch.testing.assert_close(remembered(to_float(known)), model(to_float(known)))
    assert sum(asked) == 60


def test_overlaps_are_counted():
    splits = toy_splits()
    queries = torch.cat([splits.train.images[:3], splits.test.images[:2], toy_images(5, seed=7)[0]])
    found = overlaps(splits, queries)
    assert found["queries in train"] == 3 and found["queries in test"] == 2


def test_killed_evaluation_goes_on_to_the_same_result(done, tmp_path):
    result, _, _ = done
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path[:0] = ['tests']\n"
        "from test_grid import GRID, Subject, evaluate, toy_splits, toy_victim\n"
        f"evaluate([Subject('qat', toy_victim(), 'qat')], toy_splits(), GRID, {str(tmp_path)!r})\n"
    )
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=root, stdout=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    while len(list(tmp_path.glob("cells/seed0/**/*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for file in tmp_path.glob("cells/**/*.json"):
        json.loads(file.read_text())  # none is half-written
    subject = Subject("qat", toy_victim(), "qat")
    again = evaluate([subject], toy_splits(), GRID, tmp_path, log=lambda line: None)
    timeless = [
        [{**cell.__dict__, "seconds": 0} for cell in some.cells] for some in (again, result)
    ]
    assert timeless[0] == timeless[1]


def test_an_evaluation_whose_folder_is_deleted_fails(model, tmp_path):
    def deleted(line):
        if "<-" in line:
            shutil.rmtree(tmp_path / "out")

    grid = replace(GRID, attacks=("knockoff",), budgets=(50,), seeds=1)
    with pytest.raises(FileNotFoundError, match="out was deleted, moved or replaced"):
        evaluate([Subject("a", model)], toy_splits(), grid, tmp_path / "out", log=deleted)
    assert not (tmp_path / "out").exists()


def test_an_attack_that_an_older_divqat_began_keeps_its_curve(model, tmp_path):
    test = toy_splits().test
    (tmp_path / "curve.json").write_text("[0.5, 0.25]")
    curve = Curve(tmp_path / "curve.json", test)
    curve(model, 3)
    assert Curve(tmp_path / "curve.json", test).values == [0.5, 0.25, curve.values[2]]


def test_a_thief_may_ask_about_the_victims_own_kind():
    splits = toy_splits()
    grid = Grid(query_set="own", query_limit=30)
    whole = image_keys(splits.validation.images)
    some = image_keys(grid.queries(splits))
    assert len(some) == 30 and set(some) < set(whole)
    assert image_keys(replace(grid, query_limit=None).queries(splits)) == whole


def test_a_defense_can_be_tuned_without_the_test_set(model, tmp_path):
    splits = toy_splits()
    grid = replace(GRID, split="validation", budgets=(50,), attacks=("knockoff",), holdout=20)
    measured = grid.measured(splits)
    test, rest = measured.test, measured.validation
    assert len(test) + len(rest) == len(splits.validation) and abs(len(test) - len(rest)) <= 1
    both = torch.cat([test.images, rest.images]).flatten(1)
    whole = splits.validation.images.flatten(1)
    assert torch.equal(both.unique(dim=0), whole.unique(dim=0))
    unseen = replace(splits, test=splits.test.subset(slice(1)))
    out = tmp_path / "out"
    result = evaluate([Subject("qat", model, "qat")], unseen, grid, out, log=lambda line: None)
    answers = model(to_float(test.images)).argmax(1)
    expected = (answers == test.labels).float().mean()
    assert result.released[0].accuracy == pytest.approx(float(expected))
    assert "Percent on images of the validation split" in (out / "report.md").read_text()
    # the same folder, on the test set: everything is done anew
    again = replace(grid, split="test")
    other = evaluate([Subject("qat", model, "qat")], splits, again, out, log=lambda line: None)
    assert other.released[0].accuracy != result.released[0].accuracy
    assert "Percent on the test set" in (out / "report.md").read_text()
    with pytest.raises(ConfigError, match="on which nothing is measured, got 200 and 200"):
        replace(grid, attacks=("labeled-only",), holdout=200).check(splits, 300)
