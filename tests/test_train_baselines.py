"""The baselines: ptq, kd-qat, Nasty Teacher, label smoothing."""

import pytest
import torch
from test_train import QUIET, assert_equal, assert_same
from torch.nn import functional as F
from trainings import train_interrupted

from divqat._util.files import load_checkpoint
from divqat._util.seeds import derived_seed
from divqat._util.settings import ConfigError
from divqat.data import batches
from divqat.experiments.deploy import export_run
from divqat.metrics import predict
from divqat.nn import FakeQuantize
from divqat.train import TrainConfig, load_run, train
from divqat.train.network import build_model

pytestmark = pytest.mark.slow

SETTINGS = dict(dataset="digits", model="vgg_small", batch_size=256, epochs=2, lr=0.01, threads=1)
NASTY = dict(lr=0.05, batch_size=64, epochs=3)


def config(teacher, method, **changes):
    return TrainConfig(**{**SETTINGS, "teacher": str(teacher), "method": method, **changes})


def trained(folder, *args, **changes):
    train(config(*args, **changes), folder, **QUIET)
    return load_run(folder)


def rows(run):
    return load_checkpoint(run.folder / "checkpoint.pt")["rows"]


def divergence(run, teacher, temperature=1.0):
    """Mean KL(teacher‖run) on the validation images."""
    images = run.splits().validation.images
    log_p, log_q = ((predict(r.model, images) / temperature).log_softmax(1) for r in (teacher, run))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


@pytest.fixture(scope="module")
def teacher(vgg_teacher):
    return load_run(vgg_teacher)


@pytest.fixture(scope="module")
def ptq(teacher, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "ptq", teacher.folder, "ptq")


@pytest.fixture(scope="module")
def qat(teacher, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "qat", teacher.folder, "qat")


@pytest.fixture(scope="module")
def nasty(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "nasty"
    return trained(folder, teacher.folder, "nasty", **NASTY)


def test_ptq_changes_no_weight_and_no_statistic(ptq, teacher):
    prepared = build_model(ptq.config, ptq.shape)
    prepared.load_state_dict(teacher.model.state_dict())
    wanted, state = prepared.state_dict(), ptq.model.state_dict()
    ours = [key for key in state if not key.startswith("fake_quantize.")]
    assert any("running_var" in key for key in ours) and len(ours) < len(state)
    assert_equal({key: state[key] for key in ours}, {key: wanted[key] for key in ours})
    assert all(module.fake_quant_enabled for module in quantizers(ptq.model))


def quantizers(model):
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


def test_ptq_ranges_are_moving_averages_over_the_training_images(ptq, teacher):
    model = build_model(ptq.config, ptq.shape)
    model.load_state_dict(teacher.model.state_dict())
    model.eval()
    ends = {quantizer: None for quantizer in quantizers(model)}

    def observe(quantizer, inputs):
        x = inputs[0].relu() if quantizer.relu else inputs[0]
        batch = torch.stack([x.min(), x.max()]).double()
        # m ← m + c (batch − m)
        before = ends[quantizer]
        ends[quantizer] = batch if before is None else before + 0.01 * (batch - before)

    for quantizer in ends:
        quantizer.fake_quant_enabled = False
        quantizer.register_forward_pre_hook(observe)
    for epoch in (1, 2):
        order = torch.Generator().manual_seed(derived_seed(0, "epoch", epoch))
        with torch.no_grad():
            for images, _ in batches(ptq.splits().train, 256, generator=order):
                model(images)
    for quantizer, wanted in zip(quantizers(ptq.model), ends.values(), strict=True):
        found = torch.stack([quantizer.running_min, quantizer.running_max])
        # every range includes 0
        wanted = torch.stack([wanted[0].clamp(max=0), wanted[1].clamp(min=0)])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_ptq_reports_the_loss_and_keeps_the_answers(ptq, teacher):
    for row in rows(ptq):
        assert row["lr"] == 0 and row["divergence"] is None
        assert 0 < row["loss"] == row["ce"] < 3
    splits = ptq.splits()
    float_logits, logits = (predict(run.model, splits.test) for run in (teacher, ptq))
    agree = (logits.argmax(1) == float_logits.argmax(1)).float().mean()
    assert agree > 0.95 and not torch.equal(logits, float_logits)


def test_an_interrupted_ptq_ends_with_the_same_bits(ptq, teacher, tmp_path):
    train_interrupted(config(teacher.folder, "ptq"), tmp_path, 1)
    assert_same(tmp_path, ptq.folder)


def test_ptq_with_accumulate_observes_the_same_ranges(ptq, teacher, tmp_path):
    parts = trained(tmp_path, teacher.folder, "ptq", accumulate=3)
    for ours, wanted in zip(quantizers(parts.model), quantizers(ptq.model), strict=True):
        torch.testing.assert_close(ours.running_max, wanted.running_max, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.running_min, wanted.running_min, rtol=1e-5, atol=0)


def test_distillation_without_weight_is_plain_qat_bit_for_bit(qat, teacher, tmp_path):
    assert_same_weights(trained(tmp_path, teacher.folder, "kd-qat", weight=0.0), qat)


def assert_same_weights(a, b):
    assert_equal(a.model.state_dict(), b.model.state_dict())


def test_distillation_pulls_towards_the_teacher(qat, teacher, tmp_path):
    distilled = trained(tmp_path, teacher.folder, "kd-qat")
    for row in rows(distilled):
        assert row["loss"] == pytest.approx(row["ce"] + 1.0 * 4.0**2 * row["divergence"], rel=1e-5)
    # Six runs that differ in the last bit, as on another CPU: 0.44 ± 0.04 of qat's.
    assert divergence(distilled, teacher) < 0.7 * divergence(qat, teacher)


def test_a_nasty_teacher_is_accurate_and_far_from_the_teacher(nasty, teacher, tmp_path):
    assert not quantizers(nasty.model)
    for row in rows(nasty):
        wanted = row["ce"] - 0.04 * 4.0**2 * row["divergence"]
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
    splits = nasty.splits()
    right = predict(nasty.model, splits.test).argmax(1) == splits.test.labels
    assert right.float().mean() > 0.8
    # the same training without the divergence
    plain = trained(tmp_path, teacher.folder, "nasty", **NASTY, weight=0.0)
    assert rows(plain)[-1]["loss"] == rows(plain)[-1]["ce"]
    # Six runs that differ in the last bit: 1.287 ± 0.007 times.
    assert divergence(nasty, teacher, 4.0) > 1.2 * divergence(plain, teacher, 4.0)
    with pytest.raises(ValueError, match="is full precision, and only quantized runs"):
        export_run(nasty, splits)


def test_a_nasty_teacher_has_its_own_initial_weights(nasty, teacher):
    starts = [build_model(config, nasty.shape) for config in (nasty.config, teacher.config)]
    for ours, theirs in zip(*(start.parameters() for start in starts), strict=True):
        assert not torch.equal(ours, theirs) or ours.std() == 0


def test_quantized_models_may_start_from_a_nasty_teacher(nasty, tmp_path):
    run = trained(tmp_path / "ptq", nasty.folder, "ptq", epochs=1)
    own = dict(run.model.named_parameters())
    for name, value in nasty.model.named_parameters():
        assert name not in own or torch.equal(own[name], value)
    trained(tmp_path / "divqat", nasty.folder, "divqat", epochs=1)
    with pytest.raises(ValueError, match="wanted a full-precision training, got method ptq"):
        trained(tmp_path / "qat", tmp_path / "ptq", "qat")


def test_label_smoothing_lowers_the_confidence_of_qat(qat, teacher, tmp_path):
    smooth = trained(tmp_path / "qat", teacher.folder, "qat", label_smoothing=0.3)
    assert rows(smooth)[-1]["top_probability"] < rows(qat)[-1]["top_probability"] - 0.05
    # no CE is below the entropy of the target, (1 − ε + ε / C, ε / C, …, ε / C)
    target = torch.tensor([0.73] + 9 * [0.03])
    assert all(row["ce"] > -(target * target.log()).sum() for row in rows(smooth))
    also = trained(tmp_path / "kd", teacher.folder, "kd-qat", weight=0.0, label_smoothing=0.3)
    assert_same_weights(also, smooth)


@pytest.mark.parametrize(
    ("method", "weight", "direction"),
    [("divqat", 0.15, "student_teacher"), ("nasty", 0.04, "student_teacher"),
     ("kd-qat", 1.0, "teacher_student"), ("qat", 0.15, "student_teacher")],
)  # fmt: skip
def test_defaults_depend_on_the_method(method, weight, direction):
    defaults = config("t", method)
    assert (defaults.weight, defaults.direction) == (weight, direction)
    # explicit values are kept, and a stored configuration is read back unchanged
    assert TrainConfig.from_dict(defaults.to_dict()) == defaults
    chosen = config("t", method, weight=0.5, direction="js")
    assert (chosen.weight, chosen.direction) == (0.5, "js")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="ptq"), "teacher: wanted the run folder of a full-precision .* method ptq"),
        (dict(method="nasty"), "teacher: wanted the run folder .* method nasty"),
        (dict(method="ptq", teacher="t", save_as_codes=True), "save_as_codes: wanted quantization"),
        (dict(method="nasty", teacher="t", save_as_codes=True), "got method nasty"),
        (dict(method="kd-qat", teacher="t", weight=-1), "weight: wanted a number at least 0"),
        (dict(method="kd-qat", teacher="t", direction="up"), "direction: wanted one of student_t"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
