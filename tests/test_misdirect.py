"""Misdirection: the model learns misleading answers to proxies of a thief's images."""

import csv
import math

import pytest
import torch
from captured import host_reads, replay_steps, teachers
from PIL import Image
from test_train import QUIET, SMALL, assert_same
from torch import nn
from torch.nn import functional as F
from trainings import train_interrupted

from divqat._util.files import load_checkpoint, read_json
from divqat._util.settings import ConfigError
from divqat.data import transfer
from divqat.data.batches import to_float
from divqat.data.proxies import NAMES, PROXIES
from divqat.nn import MisdirectionLoss
from divqat.nn.decoy import coarse_picture
from divqat.nn.misdirection_targets import TARGETS, MisdirectionTargets, jensen_shannon
from divqat.train import TrainConfig, load_run, step, train
from divqat.train.distributed import World
from divqat.train.objective import Objective
from divqat.train.proxies import Proxies, fit_misdirection
from divqat.train.step import Step

FEW = ("glyphs", "noise", "rotated")
DIGITS = {**SMALL, "pad": 0, "batch_size": 128, "epochs": 2, "proxies": FEW}
TEACHER = torch.tensor([[4.0, 1.0, 0.0, 3.0], [0.0, 5.0, -2.0, 2.0]])
IMAGES = to_float(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 2, 2))
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The run folder of a full-precision training."""
    folder = tmp_path_factory.mktemp("teacher") / "fp"
    train(TrainConfig(dataset="digits", batch_size=64, epochs=3, threads=1), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def misled(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("misled") / "divqat"
    train(digits(teacher), folder, **QUIET)
    return folder


@pytest.fixture
def icons(tmp_path_factory, monkeypatch):
    """A few icons in the place of Debian's, which a fresh machine does not have."""
    folder = tmp_path_factory.mktemp("icons")
    for i, picture in enumerate(torch.randint(256, (8, 24, 24), dtype=torch.uint8)):
        Image.fromarray(picture.numpy()).save(folder / f"{i}.png")
    monkeypatch.setattr(transfer, "ICONS_ROOT", str(folder))


def digits(teacher, **changes):
    own = dict(method="divqat", teacher=str(teacher), weight=0.02, misdirect=0.5)
    return TrainConfig(**{**DIGITS, **own, **changes})


def targets_of(target="permuted", seed=0, confidence=None):
    return MisdirectionTargets(target, 4, (1, 2, 2), seed, confidence)


def test_targets_by_hand():
    def targets(target, images=IMAGES):
        return targets_of(target)(TEACHER, images).tolist()

    assert targets("least_likely") == [2, 2]
    assert targets("second") == [3, 3]
    permutation = targets_of().permutation.tolist()
    assert sorted(permutation) == [0, 1, 2, 3]
    assert all(own != other for own, other in enumerate(permutation))
    assert targets("permuted") == [permutation[0], permutation[1]]
    others = {tuple(targets_of(seed=seed).permutation.tolist()) for seed in range(200)}
    assert len(others) == 9  # all permutations of four without a fixed point


@pytest.mark.parametrize(("bytes_at_once", "parts"), [(2**26, 1), (4 * 64 * 700, 2)])
def test_a_decoy_is_fitted_to_the_same_proxies_in_every_process(
    teacher, monkeypatch, bytes_at_once, parts
):
    monkeypatch.setattr("divqat.nn.misdirection.SAMPLE_BYTES", bytes_at_once)
    train_set, config = load_run(teacher).splits().train, digits(teacher)
    samples, decoys = [], []
    for rank in range(2):
        misdirection = fit_misdirection(config, 0, 10, train_set)
        decoys.append(misdirection.decoy)
        proxies = Proxies(misdirection.source, 0, Alone(rank, 2))
        samples.append(list(proxies.sample(train_set)))
    assert len(samples[0]) == parts and sum(map(len, samples[0])) >= 1400
    for mine, theirs in zip(*samples, strict=True):
        assert torch.equal(mine, theirs) and mine.device.type == "cpu"
    mine, theirs = decoys
    assert torch.equal(mine.directions, theirs.directions) and mine.directions.any()
    # fitted to the same proxies
    wanted = coarse_picture(torch.cat(samples[0])).double().mean(0).float()
    torch.testing.assert_close(mine.mean, wanted)


def test_per_image_targets_depend_on_the_image_and_are_never_the_teachers_class():
    pixels = torch.randint(256, (3000, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    images, answers = to_float(pixels.to(torch.uint8)), torch.randn(3000, 4)
    targets = targets_of("per_image")
    found = targets(answers, images)
    away = (found - answers.argmax(1)) % 4
    counts = away.bincount(minlength=4)
    assert counts[0] == 0 and (counts[1:] > 850).all() and (counts[1:] < 1150).all()
    order = torch.randperm(3000)
    strided = images[order].contiguous(memory_format=torch.channels_last)
    assert torch.equal(targets(answers[order], strided), found[order])
    other = targets_of("per_image", seed=1)
    assert (other(answers, images) == found).double().mean() < 0.5


def test_the_divergence_is_bounded():
    p, q = TEACHER.double().softmax(1), TEACHER.double().flip(1).softmax(1)
    m = (p + q) / 2
    wanted = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2
    torch.testing.assert_close(jensen_shannon(TEACHER.flip(1), TEACHER), wanted.float())
    far = torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    found = jensen_shannon(far, far.flip(1))
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0.0]))
    loss, misled = targets_of("divergence").terms(TEACHER.flip(1), TEACHER, IMAGES)
    torch.testing.assert_close(loss, (math.log(2) - wanted).sum().float())
    assert misled == 2


def test_proxies_with_confident_teacher_answers_weigh_less():
    logits = torch.zeros(2, 4)
    top = TEACHER.softmax(1).amax(1)  # 0.70 and 0.95
    for confidence, weights in [(None, [1, 1]), (0.8, [1, 1 - top[1]]), (0.5, 1 - top)]:
        loss, _ = targets_of(confidence=confidence).terms(logits, TEACHER, IMAGES)
        torch.testing.assert_close(loss, math.log(4) * torch.as_tensor(weights).sum())


def networks():
    """A model and its teacher, of 8 x 8 images."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return [nn.Sequential(nn.Flatten(), nn.Linear(64, 5)) for _ in range(2)]


def batch():
    """14 training images and their labels, and 7 proxies."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(21, 1, 8, 8, generator=generator)
    return images[:14], torch.randint(5, (14,), generator=generator), images[14:]


class Alone(World):
    """One of several processes, which run one after another instead of in parallel."""

    def wrap(self, model):
        return model


def permuted(images, labels, confidence=None):
    """A misdirection for images like these."""
    return MisdirectionLoss(
        [(images, labels)], 5, seed=0, kinds=("noise",), target="permuted", confidence=confidence
    )


def make_step(config, model, asked, labels, world, misdirection):
    objective = Objective(config, config, world, list(model.parameters()), 0, misdirection)
    return Step(model, asked, labels, world, objective, config, config)


def gradients(rank, size, accumulate=1):
    """The gradient of the weights, and the result of one step."""
    model, asked = networks()
    images, labels, proxies = batch()
    config = TrainConfig(method="divqat", teacher="a", weight=0.3, misdirect=0.7, temperature=2.0,
                         accumulate=accumulate, proxy_confidence=0.3,
                         misdirect_target="permuted")  # fmt: skip
    own = slice(rank, None, size)
    misdirection = permuted(images, labels, confidence=0.3)
    do = make_step(config, model, asked, labels, Alone(rank, size), misdirection)
    result = do(images[own], torch.arange(14)[own], proxies[own], total=14)
    return model[1].weight.grad, result


def wanted_gradients():
    """The formula, in float64: CE − λ T² KL(q‖p) + w · Σ weight · CE(q, π(teacher's)) / 7."""
    (model, asked), (images, labels, proxies) = networks(), batch()
    model, asked = model.double(), asked.double().requires_grad_(False)
    permutation = permuted(images, labels).targets.permutation
    logits, theirs = model(images.double()), asked(images.double())
    log_q, log_p = (logits / 2).log_softmax(1), (theirs / 2).log_softmax(1)
    ce = F.cross_entropy(logits, labels)
    divergence = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    logits, theirs = model(proxies.double()), asked(proxies.double()).softmax(1)
    top, first = theirs.max(1)
    losses = F.cross_entropy(logits, permutation[first], reduction="none")
    losses = losses * torch.where(top > 0.3, 1 - top, 1)
    loss = ce - 0.3 * 4 * divergence + 0.7 * losses.sum() / 7
    loss.backward()
    misled = (logits.argmax(1) == permutation[first]).sum()
    sums = [14 * loss, 14 * ce, 14 * divergence, losses.sum(), misled]
    return model[1].weight.grad, torch.stack([value.detach().double() for value in sums])


@pytest.mark.parametrize("parts", [1, 3, 9])  # some of nine hold no proxy
def test_the_loss_is_the_formula(parts):
    (grad, result), (wanted, sums) = gradients(0, 1, parts), wanted_gradients()
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result[:5], sums, rtol=1e-5, atol=1e-5)
    assert result[5:].tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [2, 3, 9])  # some of nine hold no proxy
def test_the_mean_gradient_of_processes_is_that_of_one(size):
    wanted, sums = wanted_gradients()
    found = [gradients(rank, size) for rank in range(size)]
    mean = sum(grad.double() for grad, _ in found) / size
    torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-6)
    result = sum(result for _, result in found)
    torch.testing.assert_close(result[:5], sums, rtol=1e-5, atol=1e-5)


def test_answers_to_proxies_change_and_accuracy_stays(teacher, tmp_path):
    misled, learning = tmp_path, dict(batch_size=64, lr=0.05, epochs=4, proxies=PROXIES)
    train(digits(teacher, misdirect=0.3, **learning), misled, **QUIET)
    rows = load_checkpoint(misled / "checkpoint.pt")["rows"]
    assert rows[-1]["misled"] > 0.3 and rows[-1]["misdirection"] < rows[0]["misdirection"]
    before = read_json(teacher / "summary.json")["test_accuracy"]
    summary = read_json(misled / "summary.json")
    assert summary["test_accuracy"] > before - 0.06 and summary["ms_per_step"] > 0
    with open(misled / "metrics.csv", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["misled"]) == rows[-1]["misled"]


def test_without_weight_settings_of_proxies_change_no_bit(teacher, tmp_path):
    plain = dict(weight=0.1, misdirect=0.0)
    train(digits(teacher, **plain), tmp_path / "a", **QUIET)
    others = dict(proxies=("noise",), proxy_share=2.0, misdirect_target="second")
    train(digits(teacher, **plain, **others), tmp_path / "b", **QUIET)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert "misled" not in load_checkpoint(tmp_path / "a" / "checkpoint.pt")["rows"][0]


def test_an_interrupted_run_ends_with_the_same_bits(teacher, misled, tmp_path):
    train_interrupted(digits(teacher), tmp_path, 1)
    assert_same(tmp_path, misled)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_trains_with_all_speed_options(teacher, icons, tmp_path, target):
    changes = dict(cache_teacher=True, accumulate=2, precision="bfloat16", save_as_codes=True)
    every = tuple(name for name in NAMES if name != "folder")
    train(
        digits(teacher, misdirect_target=target, proxies=every, epochs=1, **changes),
        tmp_path,
        **QUIET,
    )
    row = load_checkpoint(tmp_path / "checkpoint.pt")["rows"][0]
    assert row["misdirection"] > 0 and 0 <= row["misled"] <= 1 and row["divergence"] > 0
    assert (tmp_path / "teacher_logits.pt").is_file()


def test_without_divergence_the_teacher_sees_only_proxies(teacher, tmp_path):
    alone = dict(weight=0.0, cache_teacher=True, epochs=1, misdirect_target="permuted")
    train(digits(teacher, **alone), tmp_path, **QUIET)
    row = load_checkpoint(tmp_path / "checkpoint.pt")["rows"][0]
    assert row["divergence"] is None and row["misled"] > 0
    assert not (tmp_path / "teacher_logits.pt").exists()


@pytest.mark.parametrize(("target", "weight"), [("decoy", 0.0), ("decoy", 0.1), ("second", 0.0)])
def test_a_step_has_a_teacher_only_if_it_needs_one(teacher, tmp_path, monkeypatch, target, weight):
    seen = teachers(monkeypatch)
    config = digits(teacher, misdirect_target=target, weight=weight, epochs=1)
    train(config, tmp_path, **QUIET)
    asked = target != "decoy" or weight > 0
    assert seen and all((found is not None) == asked for found in seen)


def test_a_replayed_step_gives_the_same_bits(teacher, misled, tmp_path, monkeypatch):
    replay_steps(monkeypatch)
    train(digits(teacher), tmp_path, **QUIET)
    assert_same(tmp_path, misled)


def test_a_step_has_no_host_sync(teacher, icons, tmp_path, monkeypatch):
    seen = host_reads(monkeypatch, step.Step, Proxies)
    every = tuple(name for name in NAMES if name != "folder")
    train(digits(teacher, proxies=every, epochs=1), tmp_path, **QUIET)
    assert len(seen) == 2 * 11 and not any(seen)


def test_refusals():
    def check(message, **changes):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**{"method": "divqat", "teacher": "a", "misdirect": 1.0, **changes})

    check("misdirect: wanted 0 with a method other than divqat, got 1 with method qat",
          method="qat")  # fmt: skip
    check("proxy_root: wanted a folder if proxies include 'folder'", proxies=("folder",))
    check("proxy_root: wanted .* else none, got 'b' with proxies glyphs", proxy_root="b")
    check("proxies: wanted one of glyphs, .*, got 'openclipart'", proxies=("openclipart",))
    check("misdirect_target: wanted one of decoy", misdirect_target="none")
    check("proxy_share: wanted a number above 0", proxy_share=0)
    assert TrainConfig().proxies == PROXIES
    images, labels, _ = batch()
    with pytest.raises(ValueError, match="num_classes: wanted at least 2, got 1"):
        MisdirectionLoss([(images, labels)], 1, seed=0)
