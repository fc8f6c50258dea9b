"""Distillation from the reference on training images, beside misdirection."""

import pytest
import torch
from captured import teachers
from test_misdirect import DIGITS, batch, make_step, networks, permuted
from test_train import QUIET
from torch.nn import functional as F

from divqat._util.devices import fingerprint
from divqat._util.files import load_checkpoint, read_json
from divqat._util.settings import ConfigError
from divqat.train import TrainConfig, load_run, train
from divqat.train.distributed import World
from divqat.train.folder import write_checkpoint
from divqat.train.settings.loss import DISTILL

COSINE = {**DIGITS, "schedule": "cosine"}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The run folders of a teacher and of a plain QAT from it."""
    folder = tmp_path_factory.mktemp("runs")
    fp = dict(dataset="digits", batch_size=64, schedule="cosine", epochs=3, threads=1)
    train(TrainConfig(**fp), folder / "fp", **QUIET)
    train(TrainConfig(**COSINE, method="qat", teacher=str(folder / "fp")), folder / "qat", **QUIET)
    return folder / "fp", folder / "qat"


def settings(folders=("a", "b"), **changes):
    own = dict(teacher=str(folders[0]), reference=str(folders[1]), accuracy_budget=50.0)
    return TrainConfig(**{**COSINE, "method": "divqat", **own, **changes})


def test_the_loss_is_the_formula():
    """In float64: CE + κ T² KL(r‖q) + w · CE(q, π(teacher's))."""
    config = settings(
        misdirect=0.7,
        distill=0.5,
        temperature=2.0,
        misdirect_target="permuted",
        precision="float32",
    )
    (model, asked), (images, labels, proxies) = networks(), batch()
    misdirection = permuted(images, labels)
    do = make_step(config, model, asked, labels, World(), misdirection)
    result = do(images, torch.arange(14), proxies, total=14)

    (exact, asked), permutation = networks(), misdirection.targets.permutation
    exact, asked = exact.double(), asked.double().requires_grad_(False)
    logits, theirs = exact(images.double()), asked(images.double())
    log_q, log_r = (logits / 2).log_softmax(1), (theirs / 2).log_softmax(1)
    ce = F.cross_entropy(logits, labels)
    divergence = (log_r.exp() * (log_r - log_q)).sum(1).mean()
    logits, first = exact(proxies.double()), asked(proxies.double()).argmax(1)
    misdirection_loss = F.cross_entropy(logits, permutation[first])
    loss = ce + 0.5 * 4 * divergence + 0.7 * misdirection_loss
    loss.backward()
    torch.testing.assert_close(
        model[1].weight.grad.double(), exact[1].weight.grad, rtol=1e-4, atol=1e-6
    )
    wanted = torch.stack([14 * loss, 14 * ce, 14 * divergence, len(proxies) * misdirection_loss])
    torch.testing.assert_close(result[:4], wanted.detach(), rtol=1e-5, atol=1e-5)


def test_it_uses_the_answers_of_the_reference(folders, tmp_path, monkeypatch):
    seen = teachers(monkeypatch)
    reference = load_run(folders[1]).fingerprint
    train(settings(folders, epochs=1, cache_teacher=True), tmp_path / "told", **QUIET)
    assert seen and {fingerprint(net.state_dict()) for net in seen} == {reference}
    kept = load_checkpoint(tmp_path / "told" / "teacher_logits.pt")
    assert kept["key"]["teacher"] == reference
    row = load_checkpoint(tmp_path / "told" / "checkpoint.pt")["rows"][0]
    assert row["divergence"] > 0 and row["misled"] >= 0
    seen.clear()
    train(settings(folders, epochs=1, distill=0.0), tmp_path / "alone", **QUIET)
    assert seen and set(seen) == {None}  # a decoy needs no teacher


def test_it_keeps_answers_and_accuracy(folders, tmp_path):
    reference = load_run(folders[1])
    images = reference.splits().validation.images.float() / 255
    found = {}
    for distill in (0.0, 3.0):
        out = tmp_path / str(distill)
        train(settings(folders, distill=distill, misdirect=1.0, lr=0.005), out, **QUIET)
        with torch.no_grad():
            log_q, log_r = (
                net(images).log_softmax(1) for net in (load_run(out).model, reference.model)
            )
        away = F.kl_div(log_q, log_r, log_target=True, reduction="batchmean")
        summary = read_json(out / "summary.json")
        assert summary["budget"]["share"] == 1
        found[distill] = (float(away), summary["validation_accuracy"])
    # Six runs that differ in the last bit: 0.666 ± 0.015, and 98.0 ± 0.3 % beside 95.1 %.
    assert found[3.0][0] < 0.8 * found[0.0][0] and found[3.0][1] > found[0.0][1]


def test_when_it_is_on():
    assert settings().distill == DISTILL and settings(reference=None).distill == 0
    assert settings(weight=0.04).distill == 0 and settings(misdirect=0.0).distill == 0
    assert TrainConfig(method="qat", teacher="a").distill == 0
    for changes in (dict(reference=None), dict(weight=0.04), dict(misdirect=0.0)):
        with pytest.raises(ConfigError, match="distill: wanted 0 without misdirect and a refer"):
            settings(distill=0.5, **changes)
    for changes in ({"direction": "js"}, {"bound": 0.5}):
        with pytest.raises(
            ConfigError, match=r"direction, bound: wanted student_teacher \(the def"
        ):
            settings(**changes)


def test_a_run_from_before_it_was_there_has_none(folders, tmp_path):
    config = settings(folders, epochs=1, distill=0.0)
    train(config, tmp_path, **QUIET)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    del state["config"]["distill"]
    write_checkpoint(tmp_path, state)
    assert load_run(tmp_path).config == config
    train(config, tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"other settings \(distill: 0\.0 -> 1\.0\)"):
        train(settings(folders, epochs=1), tmp_path, **QUIET)
