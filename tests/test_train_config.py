import pytest

from divqat._util.settings import ConfigError
from divqat.train import TrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=0), "lr: wanted a number above 0, got 0"),
        (dict(lr="fast"), "lr: wanted a number above 0, got 'fast'"),
        (dict(lr=float("nan")), "lr: wanted a number"),
        (dict(epochs=1.5), "epochs: wanted a whole number at least 0, got 1.5"),
        (dict(epochs=True), "epochs: wanted a whole number"),
        (dict(epochs=None), "epochs: wanted a whole number"),
        (dict(flip="yes"), "flip: wanted true or false, got 'yes'"),
        (dict(momentum=1.0), "momentum: wanted a number at least 0 below 1, got 1"),
        (
            dict(method="qqat"),
            "method: wanted one of fp, nasty, ini, misleader, ensemble, ptq, qat, kd",
        ),
        (dict(weight_bits=9), "weight_bits: wanted a whole number at least 2 at most 8, got 9"),
        (dict(method="qat"), "teacher: wanted the run folder .* method qat, got none"),
        (dict(teacher="runs/fp"), "teacher: wanted none for method fp"),
        (dict(epochs=2, warmup_epochs=3), "warmup_epochs: wanted at most epochs = 2, got 3"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_numbers_that_yaml_reads_as_text_are_accepted():
    assert TrainConfig(weight_decay="1e-3", lr=1).weight_decay == 0.001


def test_error_for_an_unknown_key_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key in fp 'epochz' \(did you mean 'epochs'\?"):
        TrainConfig.from_dict({"epochz": 3}, where="fp")


def test_learning_rate_schedules():
    cosine = TrainConfig(epochs=10, lr=1.0, schedule="cosine", lr_warmup_epochs=2)
    rates = [cosine.learning_rate(step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and rates[10] == 1
    assert rates[30] == pytest.approx(0.5) and 0 < rates[49] < 0.01
    assert TrainConfig(epochs=10, lr=1.0, schedule="cosine").learning_rate(0, 5) == 1
    cycle = TrainConfig(epochs=10, lr=1.0)
    rates = [cycle.learning_rate(step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 25) and max(rates) == rates[30] == 1 and rates[99] < 0.01


@pytest.mark.parametrize(("epochs", "first"), [(1, None), (2, 2), (3, 3), (6, 5), (9, 7)])
def test_the_last_third_is_frozen(epochs, first):
    c = TrainConfig(epochs=epochs)
    frozen = [epoch for epoch in range(1, epochs + 1) if c.is_frozen("observers", epoch)]
    assert frozen == ([] if first is None else list(range(first, epochs + 1)))
    explicit = TrainConfig(epochs=epochs, freeze_batchnorm_epoch=1)
    assert explicit.is_frozen("batchnorm", 1)


@pytest.mark.parametrize(("method", "misdirect"), [("kd-qat", 0), ("divqat", 0.5)])
def test_batchnorm_freezes_late_if_the_loss_has_two_large_terms(method, misdirect):
    c = TrainConfig(method=method, misdirect=misdirect, teacher="t", epochs=9)
    assert [epoch for epoch in range(1, 10) if c.is_frozen("batchnorm", epoch)] == [9]
    assert [epoch for epoch in range(1, 10) if c.is_frozen("observers", epoch)] == [7, 8, 9]


@pytest.mark.parametrize(("method", "last"), [("fp", 4), ("nasty", 4), ("qat", 1)])
def test_a_scaled_learning_rate_is_lowered_when_batchnorm_freezes(method, last):
    teacher = None if method == "fp" else "t"
    c = TrainConfig(method=method, teacher=teacher, epochs=2, batch_size=512, lr_scaling="linear")
    plain = TrainConfig(epochs=2, batch_size=512)
    ratios = [c.learning_rate(step, 5) / plain.learning_rate(step, 5) for step in (4, 5)]
    assert ratios == pytest.approx([4, last])
