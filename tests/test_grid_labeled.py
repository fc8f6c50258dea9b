"""An evaluation with attacks that own labeled images."""

import shutil

import pytest
import torch
from test_grid import QUICK, toy_splits
from toys import toy_images, toy_victim

from divqat._util.settings import ConfigError
from divqat.data import ImageSet, Splits
from divqat.evaluate import Evaluation, Grid, Subject, assessment, evaluate
from divqat.evaluate.audits import audits
from divqat.evaluate.results import best_of
from divqat.evaluate.specs import control_of, make_attack, owns, steals
from divqat.evaluate.subject import image_keys
from divqat.evaluate.table import percent, spread
from divqat.evaluate.tables import attacks_table, controls_table, main_table
from divqat.experiments.run import run_study
from divqat.experiments.study import Study

pytest.importorskip("scipy.optimize")  # scikit-learn brings it

OWNING = ("relabel", "fine-tune:tune_epochs=2", "labeled-only:epochs=20")
GRID = Grid(
    attacks=("knockoff", "selective", *OWNING), defenses=("none", "label"),
    budgets=(50,), epochs=2, seeds=1, holdout=40, labeled=60, **QUICK,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return toy_victim()


def watched(patch):
    """What labeled images attacks get, and their holdout."""
    seen = []
    attack = assessment.run_attack

    def see(wanted, defended, clone, holdout, work):
        seen.append((type(wanted).__name__, getattr(wanted, "_owned", None), holdout))
        return attack(wanted, defended, clone, holdout, work)

    patch.setattr(assessment, "run_attack", see)
    return seen


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """An evaluation, where it lies, and what its attacks got."""
    out = tmp_path_factory.mktemp("labeled")
    with pytest.MonkeyPatch.context() as patch:
        seen = watched(patch)
        result = evaluate([Subject("qat", model, "qat")], toy_splits(), GRID, out, log=lambda _: 0)
    return result, out, seen


def test_all_attacks_get_the_same_images_and_none_of_the_holdout(done):
    owned = [images for _, images, _ in done[2] if images is not None]
    assert len(owned) == 5  # two of them behind both defenses, labeled-only without one
    assert all(len(images) == 60 and len(holdout) == 40 for _, images, holdout in done[2] if images)
    for images in owned[1:]:
        assert torch.equal(images.images, owned[0].images)
        assert torch.equal(images.labels, owned[0].labels)
    validation = toy_splits().validation
    mine = image_keys(owned[0].images)
    chosen = [key for _, _, holdout in done[2][:1] for key in image_keys(holdout.images)]
    assert sorted(mine + chosen) == sorted(image_keys(validation.images))  # 60 + 40 of 100


def test_the_holdout_does_not_depend_on_the_labeled_images(done, model, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    grid = Grid(attacks=("knockoff",), budgets=(50,), epochs=1, seeds=1, holdout=40, **QUICK)
    evaluate([Subject("qat", model, "qat")], toy_splits(), grid, tmp_path, log=lambda _: 0)
    assert torch.equal(seen[0][2].images, done[2][0][2].images)


def test_yardstick_is_reported_and_never_the_best(done):
    result, out, _ = done
    assert result == Evaluation.load(out / "evaluation.json")
    (alone,) = [cell for cell in result.cells if cell.attack.startswith("labeled-only")]
    assert (alone.defense, alone.queries, alone.budget, len(alone.curve)) == ("none", 0, 50, 20)
    others = [cell for cell in result.cells if cell is not alone]
    assert alone.holdout_accuracy > max(cell.holdout_accuracy for cell in others)
    assert best_of([alone]) is None
    best = best_of(result.select(result.cells, defense="none"))
    assert best is not None and best is not alone
    assert all(cell.queries == 50 for cell in others)
    assert {cell.attack for cell in others} == {*GRID.attacks} - {alone.attack}
    (row,) = [row for row in attacks_table(result).rows if row[1] == alone.attack]
    assert row[3] == "0"
    assert "labeled-only" not in main_table(result).markdown()
    assert "labeled-only:epochs=20: 60 others." in (out / "report.md").read_text()
    by_name = {audit.name: audit for audit in audits(result)}
    assert by_name["query budgets are respected"].ok
    assert not by_name["answers to other images teach nothing"].ok  # it is no control


@pytest.mark.slow
def test_other_labeled_images_leave_the_cells_of_other_attacks(done, model, tmp_path, monkeypatch):
    out = shutil.copytree(done[1], tmp_path / "out")
    seen = watched(monkeypatch)
    fewer = Grid.from_dict({**GRID.to_dict(), "labeled": 50})
    evaluate([Subject("qat", model, "qat")], toy_splits(), fewer, out, log=lambda _: 0)
    attacked = " ".join(name for name, *_ in seen)
    assert attacked == "Relabel FineTune LabeledOnly Relabel FineTune"
    assert all(len(images) == 50 for _, images, _ in seen)
    # The first of those that there were.
    assert torch.equal(seen[0][1].images, done[2][-1][1].images[:50])


def test_labels_in_a_control_are_no_leak(done):
    result = done[0]
    for attack, tried in (("knockoff", True), ("fine-tune", False)):
        spec = f"{attack}:reading=shuffled"
        cell = type(result.cells[0])(
            **{**result.cells[0].__dict__, "attack": spec, "accuracy": 0.9}
        )
        assert not steals(spec)
        found = audits(Evaluation(**{**result.__dict__, "cells": [cell]}))
        (audit,) = [a for a in found if a.name == "answers to other images teach nothing"]
        assert not audit.ok and ("not tried" not in audit.detail) == tried


def test_copies_of_labeled_images_in_the_test_set_are_a_leak(done):
    result = done[0]

    def overlap_is_fine(cells, overlap):
        changed = Evaluation(**{**result.__dict__, "cells": cells, "overlap": overlap})
        (audit,) = [a for a in audits(changed) if a.name == "queries are not the victim's images"]
        return audit.ok

    plain = [cell for cell in result.cells if not owns(cell.attack)]
    none = {"queries in train": 0}
    for overlap, with_plain, with_all in (
        ({**none, "queries in test": 0, "test in train": 2, "validation in test": 0}, True, True),
        ({**none, "queries in test": 0, "test in train": 0, "validation in test": 1}, True, False),
        ({**none, "queries in test": 1, "test in train": 0, "validation in test": 0}, False, False),
    ):
        assert overlap_is_fine(plain, overlap) == with_plain
        assert overlap_is_fine(result.cells, overlap) == with_all


def test_too_few_validation_images_are_known_before_any_work(model, tmp_path, monkeypatch):
    grid = Grid.from_dict({**GRID.to_dict(), "labeled": 61})
    message = "holdout, labeled: wanted at most 100 together, the validation .* got 40 and 61"
    with pytest.raises(ConfigError, match=message):
        evaluate([Subject("qat", model)], toy_splits(), grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    Grid.from_dict({**grid.to_dict(), "attacks": ["knockoff"]}).check(
        toy_splits(), 300
    )  # none owns any
    study = Study.from_dict(
        {
            "seeds": [0],
            "common": {"dataset": "digits", "model": "lenet"},
            "victims": {"qat": {"method": "qat"}},
            "evaluate": {"attacks": ["relabel"], "query_set": "noise"},
        }
    )
    with pytest.raises(ConfigError, match="holdout, labeled: wanted at most"):
        run_study(study, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_the_report_shows_what_the_victim_adds(model, tmp_path):
    attacks = ("knockoff", "fixmatch:ratio=1", "fixmatch:victim=false,ratio=1", "relabel")
    settings = {"budgets": (50,), "epochs": 1, "seeds": 2, "holdout": 40, "labeled": 60}
    settings |= {"batch_size": 25, "epsilons": ()}
    grid = Grid(attacks=attacks, defenses=("none", "label"), **settings, **QUICK)
    victims = [Subject("qat", model, "qat"), Subject("other", model, "divqat")]
    result = evaluate(victims, toy_splits(), grid, tmp_path, log=lambda _: 0)
    alone = result.select(result.cells, attack=attacks[2])
    assert {(cell.defense, cell.queries) for cell in alone} == {("none", 0)} and len(alone) == 4
    assert best_of(alone) is None
    table = controls_table(result)
    best = ["best of all", "best without the victim"]
    assert [row[:3] for row in table.rows] == [
        [defense, *names] for defense in ("none", "label") for names in (attacks[1:3], best)
    ]
    assert "## What the victim adds" in (tmp_path / "report.md").read_text()
    for row in table.rows[1::2]:
        for column, victim in ((5, "qat"), (8, "other")):
            cells = result.per_seed(victim, row[0], best_of)
            assert row[column] == percent(cell.accuracy for cell in cells)
            alone_too = result.select(alone, victim=victim)
            assert row[column + 1] == percent(cell.accuracy for cell in alone_too)
    for row in table.rows[::2]:
        for column, victim in ((5, "qat"), (8, "other")):
            cells = result.select(result.cells, victim=victim)
            with_it, without = (
                [cell.accuracy for cell in result.select(cells, defense=defense, attack=attack)]
                for defense, attack in ((row[0], row[1]), ("none", row[2]))
            )
            adds = (100 * (a - b) for a, b in zip(with_it, without, strict=True))
            assert row[column : column + 3] == [percent(with_it), percent(without), spread(adds)]
    (audit,) = [a for a in audits(result) if a.name == "the baseline without the victim is known"]
    assert not audit.ok and "not tried: add labeled-only;" in audit.detail
    assert "fixmatch:victim=false,ratio=1 " in audit.detail
    plain = result.select(result.cells, attack="knockoff")
    assert controls_table(Evaluation(**{**result.__dict__, "cells": plain})) is None


@pytest.mark.parametrize(
    ("attack", "among", "wanted"),
    [
        ("fixmatch", ["labeled-only", "fixmatch:victim=false"], "fixmatch:victim=false"),
        ("fixmatch", ["labeled-only", "fixmatch:victim=false,ratio=1"], None),
        ("fixmatch:ratio=1,lr=0.1", ["fixmatch:lr=0.10,victim=false,ratio=1"], 0),
        ("s4l:labels=true", ["labeled-only", "s4l", "s4l:labels=true,victim=false"], 2),
        ("s4l", ["labeled-only"], None),  # owns nothing
        ("relabel", ["labeled-only:epochs=9"], 0),
        ("fine-tune", ["labeled-only", "fine-tune:victim=false"], 1),
        ("jbda:start=owned", ["knockoff", "labeled-only"], 1),
        ("labeled-only", ["labeled-only"], None),
        ("fine-tune:victim=false", ["labeled-only", "fine-tune:victim=false"], None),
    ],
)
def test_controls_are_found(attack, among, wanted):
    assert control_of(attack, among) == (among[wanted] if isinstance(wanted, int) else wanted)


def test_what_kinds_of_attack_there_are():
    assert [spec for spec in GRID.attacks if owns(spec)] == list(OWNING)
    assert steals("relabel") and steals("selective:keep=0.1") and steals("knockoff")
    assert not steals("fixmatch:victim=false") and steals("fixmatch:victim=true")
    assert not steals("labeled-only") and not steals("selective:reading=shuffled")
    for ask in (owns, steals):
        with pytest.raises(ConfigError, match=r"unknown attack 'relable' \(did you mean 'relabel'"):
            ask("relable")


def test_what_trains_on_no_answers_trains_in_its_own_way():
    defaults = {"epochs": 9, "batch_size": 7, "lr": 1.0, "pad": 3, "flip": True, "seed": 4}
    alone = make_attack("labeled-only", {**defaults, "query_budget": 50})
    assert (alone.epochs, alone.batch_size, alone.lr) == (60, 50, 0.05)
    assert (alone.pad, alone.flip, alone.seed) == (3, True, 4)
    tuned = make_attack("fine-tune:tune_lr=0.5", defaults)
    assert (tuned.epochs, tuned.tune_epochs, tuned.lr, tuned.tune_lr) == (9, 60, 1.0, 0.5)


def test_a_split_of_their_own_is_enough(model, tmp_path):
    """A validation split of exactly the images that are owned."""
    splits = toy_splits()
    few = Splits("toys", splits.classes, splits.train, ImageSet(*toy_images(3, 5)), splits.test)
    settings = {"attacks": ("labeled-only:epochs=1",), "seeds": 1, "holdout": 1, "labeled": 2}
    grid = Grid(**settings, **QUICK)
    result = evaluate([Subject("a", model)], few, grid, tmp_path, log=lambda _: 0)
    assert [cell.queries for cell in result.cells] == [0]
