"""How calibrated and how robust the victims of an evaluation are."""

import json
from dataclasses import replace

import pytest
import torch
from toys import TEST_IMAGES, TEST_LABELS, toy_splits, toy_victim

from divqat._util.settings import ConfigError
from divqat.cli.parser import build_parser
from divqat.data import to_float
from divqat.evaluate import Evaluation, Grid, Subject, assessment, evaluate, write_report
from divqat.evaluate.results import Adversarial, SideEffects
from divqat.evaluate.tables import side_effects_table
from divqat.metrics import accuracy, expected_calibration_error, fgsm, pgd

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid(
    attacks=("knockoff",), epochs=1, seeds=2, query_limit=50, query_set="noise", clones=("lenet",),
    threads=1, epsilons=(0.02, 8 / 255), adversarial_images=100,
)  # fmt: skip


def zero(images):
    """A model that answers class 0, whatever it is asked."""
    return torch.tensor([[1.0, 0, 0, 0]]).expand(len(images), -1)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


@pytest.fixture(scope="module")
def subjects(model):
    """Of these the second has no gradients, the third other answers than its gradients tell."""
    return [
        Subject("qat", model, "qat", gradients=model),
        Subject("bare", lambda images: model(images)),
        Subject("zero", zero, gradients=model),
    ]


@pytest.fixture(scope="module")
def done(subjects, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    said = []
    return evaluate(subjects, toy_splits(), GRID, out, log=said.append), out, said


def test_rows_are_what_the_functions_say(model, done):
    result, _, said = done
    assert [(r.victim, r.seed) for r in result.side_effects] == [
        (name, seed) for name in ("qat", "bare", "zero") for seed in (0, 1)
    ]
    with torch.no_grad():
        probs = model(to_float(TEST_IMAGES)).softmax(1)
    some, labels = to_float(TEST_IMAGES[:100]), TEST_LABELS[:100]
    for row in result.select(result.side_effects, victim="qat"):
        assert row.accuracy == accuracy(probs, TEST_LABELS)
        assert row.ece == pytest.approx(expected_calibration_error(probs, TEST_LABELS), abs=1e-6)
        assert row.top_probability == pytest.approx(probs.max(1).values.mean().item())
        assert [moved.epsilon for moved in row.adversarial] == [0.02, 8 / 255]
        for moved in row.adversarial:
            with torch.no_grad():
                wanted = accuracy(model(fgsm(model, some, labels, moved.epsilon)), labels)
                near = accuracy(model(pgd(model, some, labels, moved.epsilon)), labels)
            assert (moved.images, moved.fgsm) == (100, wanted)
            assert moved.pgd == pytest.approx(near, abs=0.05)  # another random start
            assert moved.pgd < row.accuracy - 0.05
        assert row.adversarial[1].pgd < row.adversarial[0].pgd
    line = next(line for line in said if line.startswith("[seed 0 qat] accuracy"))
    assert f"PGD {result.side_effects[0].adversarial[1].pgd:.2%} at 8/255" in line


def test_without_gradients_only_calibration_is_measured(done):
    result, _, _ = done
    ours, bare = (result.select(result.side_effects, victim=v) for v in ("qat", "bare"))
    assert [replace(row, victim="bare", adversarial=[]) for row in ours] == bare


def test_the_deployed_model_is_measured(done):
    result, _, _ = done
    shares = [(TEST_LABELS[:n] == 0).double().mean().item() for n in (100, 400)]
    for row in result.select(result.side_effects, victim="zero"):
        assert row.accuracy == shares[1]
        assert {x for moved in row.adversarial for x in (moved.fgsm, moved.pgd)} == {shares[0]}


@pytest.mark.slow
def test_what_is_measured_is_kept(subjects, done, monkeypatch):
    result, out, _ = done
    measured, measure = [], assessment.measure
    monkeypatch.setattr(
        assessment, "measure", lambda *a: measured.append(a[0].subject) or measure(*a)
    )

    def again(subjects, grid=GRID):
        measured.clear()
        after = evaluate(subjects, toy_splits(), grid, out, log=lambda line: None)
        return after.side_effects, [subject.name for subject in measured]

    assert again(subjects) == (result.side_effects, [])
    other = [replace(subjects[0], gradients=toy_victim()), *subjects[1:]]  # of the same weights
    assert again(other) == (result.side_effects, [])
    fewer = replace(GRID, epsilons=(0.02,))
    rows, names = again(subjects, fewer)
    assert names == ["qat", "qat", "zero", "zero"]
    assert [row.adversarial for row in rows] == [row.adversarial[:1] for row in result.side_effects]
    other[0].gradients[0].weight.data *= 2
    assert again(other, fewer)[1] == ["qat", "qat"]
    assert again(subjects) == (result.side_effects, ["qat", "qat", "zero", "zero"])


def test_table_and_report(done):
    result, out, _ = done
    table = side_effects_table(result)
    assert table.header == [
        "Victim", "Accuracy", "ECE", "Top prob.", "FGSM 0.02", "PGD 0.02", "FGSM 8/255", "PGD 8/255"
    ]  # fmt: skip
    assert table.rows[1][0] == "bare" and table.rows[1][4:] == ["not measured"] * 4
    page = (out / "report.md").read_text()
    assert table.markdown() in page and "## Side effects" in page
    assert "the first 100 test images" in page and "Only these two attacks" in page


def test_table_by_hand(done):
    rows = [
        SideEffects(
            seed=seed, victim="qat", accuracy=a, ece=0.1, top_probability=0.9,
            adversarial=[Adversarial(epsilon=0.1, images=5, fgsm=a - 0.1, pgd=0.25)],
        )
        for seed, a in enumerate((0.5, 0.7))
    ]  # fmt: skip
    table = side_effects_table(replace(done[0], side_effects=rows))
    assert table.header[4:] == ["FGSM 0.1", "PGD 0.1"]
    assert table.rows == [
        ["qat", "60.0 ± 14.1", "10.0 ± 0.0", "90.0 ± 0.0", "50.0 ± 14.1", "25.0 ± 0.0"]
    ]


def test_no_epsilons(model, tmp_path):
    grid = replace(GRID, epsilons=(), seeds=1)
    subject = Subject("qat", model, gradients=model)
    result = evaluate([subject], toy_splits(), grid, tmp_path, log=lambda line: None)
    table = side_effects_table(result)
    assert table.header[4:] == ["FGSM", "PGD"] and table.rows[0][4:] == ["not measured"] * 2
    assert "Side effects" in (tmp_path / "report.md").read_text()


def test_an_older_evaluation_has_none(done, tmp_path):
    data = json.loads((done[1] / "evaluation.json").read_text())
    assert data["side_effects"][0]["adversarial"][1]["epsilon"] == 8 / 255
    assert Evaluation.load(done[1] / "evaluation.json").side_effects == [
        SideEffects(**{**row, "adversarial": [Adversarial(**a) for a in row["adversarial"]]})
        for row in data["side_effects"]
    ]
    del data["side_effects"], data["checksum"]
    (tmp_path / "evaluation.json").write_text(json.dumps(data))
    assert Evaluation.load(tmp_path / "evaluation.json").side_effects == []
    write_report(tmp_path)
    assert "Side effects" not in (tmp_path / "report.md").read_text()


def test_flags_and_mistakes():
    parser = build_parser()
    usual = ["evaluate", "--victim", "a.onnx", "--out", "o"]
    assert parser.parse_args([*usual, "--epsilons", "0.1", "0.2"]).epsilons == [0.1, 0.2]
    assert parser.parse_args([*usual, "--epsilons"]).epsilons == []
    for epsilons, message in [
        ((0.0,), "epsilons: wanted a number above 0 at most 1, got 0"),
        ((1.5,), "epsilons: wanted a number above 0 at most 1, got 1.5"),
        (0.1, "epsilons: wanted a list, got 0.1"),
        ((0.1, 0.1), "epsilons: wanted no duplicates"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Grid(epsilons=epsilons)
    with pytest.raises(ConfigError, match="adversarial_images: wanted a whole number at least 1"):
        Grid(adversarial_images=0)
    with pytest.raises(TypeError, match=r"gradients: wanted an nn.Module or None, got str"):
        Subject("qat", zero, gradients="runs/qat")
