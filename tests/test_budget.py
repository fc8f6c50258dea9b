"""The accuracy budget weakens the defense until validation accuracy is within it."""

import shutil
from dataclasses import replace

import pytest
import torch
from test_train import QUIET, assert_equal, assert_same
from trainings import train_interrupted, train_until

from divqat._util.files import load_checkpoint, read_json, save_checkpoint
from divqat._util.settings import ConfigError
from divqat.train import TrainConfig, distributed, load_run, train, trainer
from divqat.train.budget import Budget, interpolate
from divqat.train.folder import load_splits
from divqat.train.network import build_model
from divqat.train.settings.misdirection import MISDIRECT

DIGITS = dict(
    dataset="digits", batch_size=64, lr=0.05, schedule="cosine", epochs=4, threads=1
)  # fmt: skip
STRONG = dict(method="divqat", weight=0.2, misdirect=0.0, lr=0.005)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


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
def free(teacher, tmp_path_factory):
    """The same training without a budget."""
    folder = tmp_path_factory.mktemp("free") / "divqat"
    train(TrainConfig(**{**DIGITS, **STRONG}, teacher=str(teacher)), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def kept(teacher, qat, tmp_path_factory):
    """Within a budget by interpolation only."""
    folder = tmp_path_factory.mktemp("kept") / "divqat"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("divqat.train.budget.REWINDS", 0)
        train(settings(teacher, qat), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def rewound(teacher, qat, tmp_path_factory):
    """Tried three times, then interpolated."""
    folder = tmp_path_factory.mktemp("rewound") / "divqat"
    train(settings(teacher, qat), folder, **QUIET)
    return folder


def test_the_budget_is_kept_where_the_same_training_without_it_exceeds_it(qat, free, kept):
    reference = read_json(qat / "summary.json")["validation_accuracy"]
    broken, summary = (read_json(folder / "summary.json") for folder in (free, kept))
    assert broken["budget"] is None and broken["validation_accuracy"] < reference - 0.2
    assert summary["validation_accuracy"] >= reference - 0.03 - 1e-9
    report = summary["budget"]
    assert report["inside"] and report["reference"] == reference and report["points"] == 3
    assert 0 < report["share"] < 1 and report["points_below"] <= 3
    assert not any(warning.startswith("accuracy_budget") for warning in summary["warnings"])
    # the path starts with the result of the training without a budget
    assert report["path"][0]["validation_accuracy"] == broken["validation_accuracy"]
    assert (kept / "plots" / "budget.png").is_file()
    assert not (free / "plots" / "budget.png").exists()
    # the loaded model is the measured one, and lies between the two
    run, start, end = load_run(kept), load_run(qat), load_run(free)
    validation = run.splits().validation
    found = trainer.accuracy(trainer.predict(run.model, validation), validation.labels)
    assert found == summary["validation_accuracy"]
    way = interpolate(start.model.state_dict(), end.model.state_dict(), report["share"])
    for name, value in run.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, way[name], equal_nan=True)


def weakened(config, out, name):
    """Train without a budget: three epochs with the full weight, then from there one each with the
    full weight, half and a quarter. Yields the three folders."""
    config = replace(config, accuracy_budget=None, reference=None)
    for share in (1.0, 0.5, 0.25):
        folder = out / str(share)
        weaker = replace(config, **{name: share * getattr(config, name)})
        if share < 1:
            shutil.copytree(out / "begun", folder)
            state = load_checkpoint(folder / "checkpoint.pt")
            save_checkpoint(folder / "checkpoint.pt", state | {"config": weaker.to_dict()})
        else:
            train_until(config, folder, 3)
            shutil.copytree(folder, out / "begun")
        train(weaker, folder, **QUIET)
        yield folder


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(weight=0.0, misdirect=4.0, distill=0.0, proxies=("noise", "rotated"))],
    ids=["weight", "misdirect"],
)
def test_a_network_over_budget_repeats_its_last_third_with_a_weaker_defense(
    teacher, qat, tmp_path, changes
):
    config = settings(teacher, qat, accuracy_budget=0.01, **changes)
    lines = []
    train(config, tmp_path / "run", log=lines.append)
    again = [line for line in lines if "going back to epoch 3, with" in line]
    assert [line.split()[-5] for line in again] == ["0.5", "0.25"]
    report = read_json(tmp_path / "run" / "summary.json")["budget"]
    name = "misdirect" if changes else "weight"
    folders = list(weakened(config, tmp_path, name))
    tried = [*report["attempts"], report["path"][0]]
    for attempt, folder in zip(tried, folders, strict=True):
        found = read_json(folder / "summary.json")["validation_accuracy"]
        assert attempt["validation_accuracy"] == found
    assert [attempt["weaker"] for attempt in report["attempts"]] == [1, 0.5]
    assert report["weaker"] == 0.25 and tried[-1]["share"] == 1
    rows = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["rows"]
    wanted = load_checkpoint(folders[-1] / "checkpoint.pt")["rows"]
    assert [row["loss"] for row in rows] == [row["loss"] for row in wanted]
    # if the last attempt is within the budget, it is the result
    inside = dict(accuracy_budget=tried[-1]["points_below"] + 0.001)
    assert inside["accuracy_budget"] < min(a["points_below"] for a in report["attempts"])
    train(replace(config, **inside), tmp_path / "inside", **QUIET)
    assert_same(tmp_path / "inside", folders[-1])


def test_the_last_network_within_the_budget_is_the_result(teacher, qat, tmp_path, monkeypatch):
    """The last among the last third, even if the run is interrupted in between."""
    config = settings(teacher, qat, epochs=6)
    free = replace(config, accuracy_budget=None, reference=None)
    train_until(free, tmp_path / "free", 5)
    # answers after epoch 5, after the last epoch, and for the path
    inside = iter([True, False, *[True] * 9])
    monkeypatch.setattr("divqat.train.budget._within", lambda below, points: next(inside))
    # whether it collapsed is judged by the result
    monkeypatch.setattr(
        "divqat.train.run.collapse_warning", lambda rows, result, *_, **__: str(result)
    )
    train_interrupted(config, tmp_path / "run", 5)
    report = read_json(tmp_path / "run" / "summary.json")["budget"]
    assert report["path"][0]["epoch"] == 5 and report["share"] == 1 and not report["attempts"]
    wanted, found = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("free", "run"))
    assert_equal(found["model"], wanted["model"])
    assert [row["epoch"] for row in found["rows"]] == [1, 2, 3, 4, 5, 6]
    assert found["kept"] is None  # no longer needed
    asked = str(wanted["rows"][-1]["validation_accuracy"])
    assert asked in read_json(tmp_path / "run" / "summary.json")["warnings"]


def test_distillation_is_not_weakened(teacher, qat, tmp_path):
    config = settings(teacher, qat, weight=0.0, misdirect=1.0, proxies=("noise",))
    assert config.distill == 1
    made = trainer.Trainer(
        config, load_splits(config), load_run(teacher), distributed.World(), tmp_path
    )
    made.objective.set_strength(0.5)
    assert made.objective.strength == 0.5 and float(made.objective.divergence.final_weight) == -1


@pytest.mark.parametrize("epoch", [1, 4])
def test_an_interrupted_run_ends_with_the_same_bits(teacher, qat, rewound, tmp_path, epoch):
    train_interrupted(settings(teacher, qat), tmp_path, epoch)
    assert_same(tmp_path, rewound)
    timed = ("seconds", "ms_per_step", "waiting", "peak_memory", "sha256")  # sha256 covers times
    ours, theirs = (read_json(folder / "summary.json") for folder in (tmp_path, rewound))
    for summary in ours, theirs:
        assert len(summary["budget"]["attempts"]) == 2
        assert summary["seconds"] > sum(a.pop("seconds") for a in summary["budget"]["attempts"]) > 0
    assert {k: v for k, v in ours.items() if k not in timed} == {
        k: v for k, v in theirs.items() if k not in timed
    }


def test_without_a_reference_the_budget_counts_from_the_teacher(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("divqat.train.budget.REWINDS", 0)
    lines = []
    config = settings(
        teacher, None, reference=None, epochs=1, misdirect=2.0, weight=0.0,
        proxies=("noise", "rotated"), misdirect_target="permuted",
    )  # fmt: skip
    train(config, tmp_path, log=lines.append)
    report = read_json(tmp_path / "summary.json")["budget"]
    assert report["reference"] == read_json(teacher / "summary.json")["validation_accuracy"]
    assert 0 < report["share"] < 1  # the larger the share, the more proxies are misled
    misled = [row["misled"] for row in report["path"]]
    assert 1 >= misled[0] > misled[-1] > 0
    assert any(line.startswith("accuracy budget: ") and "of the way" in line for line in lines)


def test_without_a_reference_the_path_ends_at_the_teacher(teacher, free):
    """Its BatchNorm parameters have other names than those folded into convolutions."""
    run, start = load_run(free), load_run(teacher)
    validation = run.splits().validation
    budget = Budget.from_config(settings(teacher, None, reference=None), start, validation)
    ways = interpolate(budget.start, run.model.state_dict(), 0)
    wanted = build_model(run.config, run.shape)
    wanted.load_state_dict(start.model.state_dict())
    for name, value in wanted.state_dict().items():
        if "fake_quantize" not in name and not name.endswith("_extra_state"):
            assert name.endswith("num_batches_tracked") or torch.equal(ways[name], value), name
    run.model.load_state_dict(ways)
    found = trainer.accuracy(trainer.predict(run.model, validation), validation.labels)
    assert abs(found - budget.reference) < 0.03


def test_an_exceeded_budget_gives_a_warning(teacher, tmp_path):
    lines = []
    config = settings(
        teacher, None, reference=None, accuracy_budget=0.001, epochs=1,
        weight_bits=2,
    )  # fmt: skip
    train(config, tmp_path, log=lines.append)
    (warning,) = read_json(tmp_path / "summary.json")["warnings"]
    assert warning.startswith("accuracy_budget: wanted at most 0.001 points below")
    assert lines[-1] == f"warning: {warning}"


def test_a_reference_that_changed_is_refused(teacher, qat, tmp_path):
    def log(line):
        if line.startswith("epoch 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(teacher, qat), tmp_path / "run", log=log)
    other = TrainConfig(**{**DIGITS, "lr": 0.02, "epochs": 1}, method="qat", teacher=str(teacher))
    train(other, tmp_path / "qat", **QUIET)
    with pytest.raises(ValueError, match="reference: it has changed"):
        train(settings(teacher, tmp_path / "qat"), tmp_path / "run", **QUIET)


def test_a_budget_turns_misdirection_on():
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

    def refused(message, reference, error=ValueError, **changes):
        with pytest.raises(error, match=message):
            train(settings(teacher, reference, **changes), tmp_path / "a", **QUIET)

    refused("reference: wanted a training with method = qat, got fp", teacher)
    refused("validation_fraction", qat, validation_fraction=0.2)
    refused("reference: wanted a training with weight_bits = 4, got 7", qat, weight_bits=4)
    refused("no training at", tmp_path / "none", error=FileNotFoundError)
    own = TrainConfig(**{**DIGITS, "epochs": 1, "seed": 5})
    train(own, tmp_path / "fp", **QUIET)
    foreign = TrainConfig(**{**DIGITS, "epochs": 1}, method="qat", teacher=str(tmp_path / "fp"))
    train(foreign, tmp_path / "qat", **QUIET)
    refused("reference: wanted a training from the teacher", tmp_path / "qat")
