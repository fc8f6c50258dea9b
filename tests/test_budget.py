"""The defense's strength is steered so that validation accuracy stays within a budget."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_train import QUIET, assert_same
from test_train_captured import tape
from torch import nn
from trainings import train_interrupted

from divqat.files import load_checkpoint, read_json
from divqat.nn import DivQATLoss
from divqat.options import ConfigError
from divqat.train import TrainConfig, graph, load_run, loop, train, trainer
from divqat.train.budget import FLOOR, START, Budget
from divqat.train.learning import MISDIRECT

DIGITS = dict(dataset="digits", batch_size=64, lr=0.05, epochs=4, threads=1)
STRONG = dict(method="divqat", weight=0.6, misdirect=0.0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "fp"
    train(TrainConfig(**{**DIGITS, "epochs": 5}), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def qat(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat") / "qat"
    train(TrainConfig(**DIGITS, method="qat", teacher=str(teacher)), folder, **QUIET)
    return folder


def settings(teacher, qat, **changes):
    own = dict(teacher=str(teacher), accuracy_budget=3.0, reference=str(qat))
    return TrainConfig(**{**DIGITS, **STRONG, **own, **changes})


@pytest.fixture(scope="module")
def steered(teacher, qat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered") / "divqat"
    train(settings(teacher, qat), folder, **QUIET)
    return folder


def budget(points=2.0, course=(0.9,), epochs=4, checks=4):
    return Budget(points, course, epochs, checks)


def test_the_ascent_by_hand():
    """η = ½, aim half of 2 points: log f falls by ½ · (points below − 1) / 2."""
    one = budget()
    assert one.factor == START
    for accuracy, move in [
        (0.89, 0.0),  # as aimed
        (0.87, -0.5),  # two points too low: one budget
        (0.90, 0.25),
        (0.91, 0.5),
        (0.99, 0.5),  # no more than one budget at once
        (0.10, -1.0),  # no more than two
    ]:
        one.factor = 0.2
        assert one.steer(accuracy, 4) == pytest.approx(0.2 * math.exp(move)), accuracy
    one.factor = 0.9
    assert one.steer(0.95, 4) == 1
    one.factor = 0.011
    assert one.steer(0.1, 4) == FLOOR


@given(
    accuracies=st.lists(st.floats(0, 1), max_size=30), points=st.floats(1e-3, 99, exclude_min=True)
)
def test_the_factor_stays_between_its_ends_and_follows_accuracy(accuracies, points):
    one = budget(points)
    for accuracy in accuracies:
        before = one.factor
        after = one.steer(accuracy, 1)
        assert FLOOR <= after <= 1
        if one.below(accuracy) > points:
            assert after <= before
        if accuracy >= 0.9:
            assert after >= before


def test_what_is_expected_is_the_references_course():
    one = budget(course=(0.6, 0.8, 0.95, 0.9), epochs=2)  # of half as many epochs
    assert [one.expected(epoch) for epoch in (0.1, 0.5, 0.75, 1)] == pytest.approx(
        [0.6, 0.6, 0.7, 0.8]
    )
    # not more than the reference ended with
    assert [one.expected(epoch) for epoch in (1.5, 1.75, 2)] == pytest.approx([0.9, 0.9, 0.9])
    assert one.reference == 0.9
    assert budget().expected(0.3) == budget().expected(4) == 0.9  # that of a teacher is constant


def test_measurements_are_spread_over_the_epoch():
    def due(checks, steps, epoch=3):  # of 4
        one = budget(checks=checks)
        return [step for step in range(1, steps + 1) if one.due(epoch, step, steps)]

    assert due(4, 20) == [5, 10, 15]
    assert due(4, 10) == [3, 5, 8]
    assert due(1, 10) == []
    assert due(4, 1) == []
    assert due(9, 3) == [1, 2]
    assert due(4, 20, epoch=2) == []  # the first half
    one = budget(epochs=1)
    assert [step for step in range(1, 21) if one.due(1, step, 20)] == [15]


def test_the_strongest_epoch_inside_is_the_result():
    one, model = budget(), nn.Linear(1, 1, bias=False)

    def end(epoch, accuracy, divergence, **more):
        model.weight.data.fill_(epoch)
        row = {"epoch": epoch, "validation_accuracy": accuracy, "divergence": divergence, **more}
        return row | one.end_epoch(row, model)

    def result(row):
        one.choose(row, model)
        return one.epoch, float(model.weight.detach())

    row = end(1, 0.5, 9.0)
    assert result(row) == (1, 1.0) and "no epoch ended inside" in one.warning(row)
    assert row["factor"] == START and row["points_below"] == pytest.approx(40)
    assert result(end(2, 0.885, 2.0)) == (2, 2.0)
    assert result(end(3, 0.895, 1.0)) == (3, 3.0)  # the last one, if it is inside
    row = end(4, 0.87, 8.0)
    assert not one.inside(0.87) and result(row) == (2, 2.0)  # else the strongest
    one.kept.clear()
    end(5, 0.89, None, misled=0.4)
    end(6, 0.89, 3.0, misled=0.3)
    assert result(end(7, 0.1, 3.0, misled=0.9)) == (5, 5.0)
    assert one.inside(0.88) and one.warning({"validation_accuracy": 0.88}) is None


def test_the_budget_holds_where_the_same_weight_would_break_it(teacher, qat, steered, tmp_path):
    free = TrainConfig(**DIGITS, **STRONG, teacher=str(teacher))
    train(free, tmp_path, **QUIET)
    reference = read_json(qat / "summary.json")["validation_accuracy"]
    broken = read_json(tmp_path / "summary.json")
    assert broken["budget"] is None and broken["validation_accuracy"] < reference - 0.2
    summary, rows = read_json(steered / "summary.json"), load_checkpoint(steered / "checkpoint.pt")
    assert summary["validation_accuracy"] >= reference - 0.03 - 1e-9
    told = summary["budget"]
    assert told["inside"] and told["reference"] == reference and told["points"] == 3
    assert told["points_below"] <= 3 and not summary["warnings"]
    assert len({row["factor"] for row in rows["rows"]}) > 1
    assert all(FLOOR <= row["factor"] <= 1 for row in rows["rows"])
    # what is loaded is what was measured
    run = load_run(steered)
    logits = trainer.predict(run.model, run.splits().validation)
    found = trainer.accuracy(logits, run.splits().validation.labels)
    assert found == summary["validation_accuracy"]


@pytest.mark.parametrize("epoch", [1, 4])
def test_an_interrupted_run_ends_with_the_same_bits(teacher, qat, steered, tmp_path, epoch):
    train_interrupted(settings(teacher, qat), tmp_path, epoch)
    assert_same(tmp_path, steered)
    timed = ("seconds", "ms_per_step", "waiting", "peak_memory")
    ours, theirs = (read_json(folder / "summary.json") for folder in (tmp_path, steered))
    assert {k: v for k, v in ours.items() if k not in timed} == {
        k: v for k, v in theirs.items() if k not in timed
    }


def test_a_captured_step_follows_the_factor(teacher, qat, tmp_path, monkeypatch):
    """λ and the misdirection's weight are read where they lie, not as they were when captured."""
    config = settings(teacher, qat, epochs=2, misdirect=0.5, proxies=("noise", "rotated"))
    train(config, tmp_path / "eager", **QUIET)

    class Replaying(trainer.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.do_step = graph.Captured(self.step, tape)

    monkeypatch.setattr(loop, "Trainer", Replaying)
    train(config, tmp_path / "replayed", **QUIET)
    assert_same(tmp_path / "eager", tmp_path / "replayed")
    assert load_checkpoint(tmp_path / "eager" / "checkpoint.pt")["rows"][0]["misled"] > 0


def test_both_weights_are_scaled(teacher, qat, tmp_path, monkeypatch):
    seen = []
    original = trainer.Step.scale

    def watched(self, factor):
        original(self, factor)
        assert isinstance(self.loss, DivQATLoss) and self.loss.enabled
        seen.append((factor, float(self.loss.final_weight), float(self.misdirection.weight)))

    monkeypatch.setattr(trainer.Step, "scale", watched)
    config = settings(teacher, qat, epochs=1, misdirect=2.0, proxies=("noise",), reference=None)
    lines = []
    train(config, tmp_path, log=lines.append)
    assert len(seen) == 4 and seen[0][0] == START  # the start, two checks, the epoch's end
    for factor, weight, misdirect in seen:
        assert (weight, misdirect) == pytest.approx((0.6 * factor, 2 * factor))
    assert f"factor {seen[2][0]:.3f}" in lines[0]
    summary = read_json(tmp_path / "summary.json")
    before = read_json(teacher / "summary.json")["validation_accuracy"]
    assert summary["budget"]["reference"] == before  # without a reference, the teacher's


def test_a_budget_that_is_not_kept_is_told(teacher, tmp_path):
    lines = []
    config = settings(teacher, None, reference=None, accuracy_budget=0.01, epochs=1, weight=9.0)
    train(config, tmp_path, log=lines.append)
    (warning,) = read_json(tmp_path / "summary.json")["warnings"]
    assert warning.startswith("accuracy_budget: wanted at most 0.01 points below")
    assert lines[-1] == f"warning: {warning}"


def test_a_budget_brings_the_misdirection_that_it_bounds():
    def weights(**changes):
        config = TrainConfig(**{"method": "divqat", "teacher": "a", **changes})
        return config.weight, config.misdirect

    assert weights() == (0.15, 0)
    assert weights(misdirect=0.3) == (0, 0.3)
    assert weights(accuracy_budget=1.0) == (0, MISDIRECT)
    assert weights(accuracy_budget=1.0, misdirect=0.0) == (0.15, 0)
    assert weights(accuracy_budget=1.0, weight=0.04) == (0.04, MISDIRECT)


def test_refusals(teacher, qat, tmp_path):
    def check(message, **changes):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**{"method": "divqat", "teacher": "a", **changes})

    wanted = "accuracy_budget: wanted method divqat with weight or misdirect above 0, got method "
    check(f"{wanted}qat", method="qat", accuracy_budget=1.0)
    neither = dict(weight=0.0, misdirect=0.0)
    check(f"{wanted}divqat, weight = 0, misdirect = 0", **neither, accuracy_budget=1.0)
    check("accuracy_budget: wanted a number above 0", accuracy_budget=0.0)
    check("reference: wanted none without accuracy_budget, got 'b'", reference="b")
    with pytest.raises(ValueError, match="reference: wanted a training with method = qat, got fp"):
        train(settings(teacher, teacher), tmp_path / "a", **QUIET)
    other = settings(teacher, qat, validation_fraction=0.2)
    with pytest.raises(ValueError, match="validation_fraction"):
        train(other, tmp_path / "b", **QUIET)
    with pytest.raises(FileNotFoundError, match="no training at"):
        train(settings(teacher, tmp_path / "none"), tmp_path / "c", **QUIET)
