"""A learning rate for a large batch is too high once BatchNorm is frozen."""

import math

import pytest
from test_train import QUIET, config

from divqat._util.files import load_checkpoint, read_json
from divqat.train import TrainConfig, train
from divqat.train.collapse import collapse_warning

pytestmark = pytest.mark.slow

# Frozen from epoch 3 on, at lr 0.1, where it has been scaled by 8.
SCALED = dict(
    method="qat", model="vgg_small", pad=0, epochs=3, batch_size=256, lr=0.05,
    lr_scaling="linear", base_batch_size=32,
)  # fmt: skip
UNSCALED = {**SCALED, "lr": 0.4, "lr_scaling": "none"}


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 8), ("sqrt", 8**0.5)])
def test_the_learning_rate_is_scaled_until_batchnorm_freezes(scaling, factor):
    settings = dict(method="qat", teacher="a", epochs=6, base_batch_size=32, lr=0.05)
    plain = TrainConfig(**settings, batch_size=256)
    large = TrainConfig(**settings, batch_size=256, lr_scaling=scaling)
    for step in range(60):
        expected = factor if step < 40 else 1
        assert large.learning_rate(step, 10) / plain.learning_rate(step, 10) == pytest.approx(
            expected
        )
    small = TrainConfig(**settings, batch_size=8, lr_scaling=scaling)
    never = TrainConfig(**settings, batch_size=256, lr_scaling=scaling, freeze_batchnorm_epoch=7)
    fp = TrainConfig(**{**settings, "method": "fp", "teacher": None}, batch_size=256,
                     lr_scaling=scaling)  # fmt: skip
    for step in (0, 39, 40, 59):
        lr = plain.learning_rate(step, 10)
        assert never.learning_rate(step, 10) == fp.learning_rate(step, 10)
        assert fp.learning_rate(step, 10) == pytest.approx(lr * factor)
        # A small batch keeps its lower rate: gradient noise limits it before and after.
        assert small.learning_rate(step, 10) == pytest.approx(
            lr * 4 ** (-1 if factor == 8 else -0.5)
        )


def test_training_with_a_scaled_learning_rate_survives_the_freezing(vgg_teacher, tmp_path):
    lines = []
    summary = train(config(vgg_teacher, **SCALED), tmp_path, log=lines.append)
    # Six runs that differ in the last bit: 99.3 % each, one of 143 images wrong.
    assert summary["validation_accuracy"] > 0.95 and summary["warnings"] == []
    assert not any("warning" in line for line in lines)


def survived(folder):
    """Whether the last epoch is at least half as good as the best, so that nothing collapsed."""
    rows = load_checkpoint(folder / "checkpoint.pt")["rows"]
    accuracies = [row["validation_accuracy"] for row in rows]
    return accuracies[-1] >= max(accuracies) / 2


def test_a_training_that_collapses_warns(vgg_teacher, tmp_path, monkeypatch):
    """Steps of length 1000 in the last epoch replace the weights, of norm 10, by gradients. A lower
    rate would collapse on one CPU and not on another."""
    learning_rate = TrainConfig.learning_rate

    def too_high(self, step, steps_per_epoch):
        return learning_rate(self, step, steps_per_epoch) if step < 2 * steps_per_epoch else 1000.0

    monkeypatch.setattr(TrainConfig, "learning_rate", too_high)
    settings, lines = config(vgg_teacher, **{**SCALED, "grad_clip": 1.0}), []
    summary = train(settings, tmp_path, log=lines.append)
    assert not survived(tmp_path)
    (warning,) = summary["warnings"]
    assert "BatchNorm froze in epoch 3" in warning and "freeze_batchnorm_epoch = 4" in warning
    assert lines[-1] == f"warning: {warning}"
    assert read_json(tmp_path / "summary.json")["warnings"] == [warning]
    lines.clear()
    train(settings, tmp_path, log=lines.append)  # it is done already
    assert lines[-1] == f"warning: {warning}"


def test_without_the_freezing_training_does_not_collapse(vgg_teacher, tmp_path):
    """The same learning rates as scaled ones, but set directly."""
    settings = config(vgg_teacher, **UNSCALED, freeze_batchnorm_epoch=4)
    summary = train(settings, tmp_path, **QUIET)
    # Six runs that differ in the last bit: 98.8 ± 0.6 %.
    assert summary["validation_accuracy"] > 0.95 and summary["warnings"] == []


@pytest.mark.parametrize(
    ("accuracies", "method", "expected_text"),
    [
        ([0.5, 0.9, 0.45], "qat", None),  # half is not less than half
        ([0.5, 0.9, 0.449], "qat", "from 90.00% in epoch 2 to 44.90%; BatchNorm froze in"),
        ([0.1, 0.4, 0.9], "qat", None),
        ([0.9, 0.1, 0.9], "qat", None),  # recovered
        ([0.1, 0.1, 0.1], "qat", None),  # never learned: nothing was lost
        ([0.5, 0.9, 0.1], "fp", "to 10.00%: try a smaller lr, or grad_clip"),  # does not freeze
        ([0.9], "qat", None),
    ],
)  # fmt: skip
def test_what_counts_as_a_collapse(accuracies, method, expected_text):
    settings = TrainConfig(method=method, teacher=None if method == "fp" else "a", epochs=3)
    rows = [{"epoch": i, "validation_accuracy": a} for i, a in enumerate(accuracies, start=1)]
    frozen_from = settings.freeze_epoch("batchnorm") if settings.kind.quantized else math.inf
    warning = collapse_warning(rows, accuracies[-1], frozen_from, 4)
    assert warning is None if expected_text is None else expected_text in warning


def test_collapse_is_judged_by_the_network_that_a_budget_chose():
    rows = [{"epoch": i, "validation_accuracy": a} for i, a in enumerate([0.5, 0.9, 0.1], start=1)]
    assert collapse_warning(rows, 0.9, 3, 4) is None
    assert "to 40.00%; BatchNorm froze" in collapse_warning(rows, 0.4, 3, 4)
