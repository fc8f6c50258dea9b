"""Attacks by thieves who have read how a decoy works."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from toys import (
    CLASSES,
    QUERIES,
    Killed,
    kill_at,
    same_bits,
    toy_images,
    toy_model,
    toy_splits,
    toy_victim,
)

from divqat._util.settings import ConfigError
from divqat.attacks import (
    DetectAndDrop,
    KnockoffNets,
    KnownDecoy,
    ReEncode,
    Residual,
    SameShade,
    attack,
    detect_and_drop,
)
from divqat.attacks.answers import centred_logs
from divqat.attacks.residual import PENALTIES, cross_fitted, ridge
from divqat.attacks.same_shade import block_of, shuffled_inside
from divqat.data import ImageSet, to_float
from divqat.evaluate import Grid, Subject, evaluate
from divqat.experiments.subjects import decoy_of
from divqat.nn.decoy import Decoy, Sample, coarse_picture
from divqat.train import TrainConfig, load_run, train, trainer
from divqat.train.proxies import fit_misdirection
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")
CLONE = toy_model(seed=1)
OWNED = ImageSet(*toy_images(60, seed=6))
MODEL = toy_victim()


@cache
def decoy():
    fitted = Decoy(CLASSES, 1, seed=3)
    images, labels = toy_images(400, seed=7)
    fitted.fit([Sample(to_float(QUERIES), to_float(images), labels)])
    return fitted


def misled(images):
    """A victim that answers its own logits and three times the decoy's."""
    with torch.no_grad():
        return MODEL(images) + 3 * decoy()(images).log()


ATTACKS = [
    Residual(),
    Residual(regression="network"),
    SameShade(copies=1),
    ReEncode(),
    KnownDecoy().knowing(decoy()),
    KnownDecoy(way="drop").knowing(decoy()),
    DetectAndDrop(
        shadows=1, shadow_epochs=1, shadow_batch_size=20, shadow_pad=1, proxy_share=0.5
    ).owning(OWNED),
]
each = pytest.mark.parametrize("settings", ATTACKS, ids=lambda a: f"{type(a).__name__}")


def quick(settings, **changes):
    given = {**dict(epochs=2, batch_size=32, query_budget=100), **changes}
    made = replace(settings, **given)
    for name in ("_decoy", "_owned"):
        if hasattr(settings, name):
            object.__setattr__(made, name, getattr(settings, name))
    return made


@cache
def whole(number):
    return quick(ATTACKS[number])(Victim(misled), QUERIES, CLONE)


# what all must do


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_the_budget_is_exact_and_the_seed_decides(number):
    settings = ATTACKS[number]
    victim, before = Victim(misled, query_budget=100), torch.get_rng_state()
    found = quick(settings)(victim, QUERIES, CLONE)
    images, answers = found.transfer_set
    assert found.queries == victim.queries == len(images) == len(answers) == 100
    assert torch.equal(answers, Victim(misled)(to_float(images)))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(found.clone, whole(number).clone)
    other = quick(settings, seed=1)(Victim(misled), QUERIES, CLONE)
    assert not torch.equal(other.transfer_set[0], images)
    poor = Victim(misled, query_budget=99)
    with pytest.raises(QueryBudgetExceeded, match="needs 100 queries, the victim allows 99"):
        quick(settings)(poor, QUERIES, CLONE)
    assert poor.queries == 0


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_a_killed_run_goes_on_bit_identically(number, tmp_path, monkeypatch):
    monkeypatch.setattr(attack, "QUERIES_PER_SAVE", 40)
    wanted = whole(number)
    for when in (2.5, 4):
        folder = tmp_path / str(when)
        with monkeypatch.context() as patch:
            kill_at(patch, when)
            with pytest.raises(Killed):
                quick(ATTACKS[number])(Victim(misled), QUERIES, CLONE, resume_dir=folder)
        victim = Victim(misled, query_budget=20 if when == 2.5 else 0)
        resumed = quick(ATTACKS[number])(victim, QUERIES, toy_model(seed=9), resume_dir=folder)
        assert same_bits(wanted.clone, resumed.clone)


@pytest.mark.parametrize("answer", ["label", "topk"])
@each
def test_a_victim_that_shows_less_is_attacked_too(settings, answer):
    victim = Victim(misled, answer=answer, **({"k": 2} if answer == "topk" else {}))
    found = quick(settings)(victim, QUERIES, CLONE)
    assert all(p.isfinite().all() for p in found.clone.parameters())


# residual


def test_ridge_is_the_minimum_and_its_penalty_the_best():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 2
    y = x[:, :2] @ torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=torch.float64) + 5
    y = y + torch.randn(40, 3, generator=generator, dtype=torch.float64)
    centred, n = (x - x.mean(0)).numpy(), len(x)
    errors, weights = [], []
    for penalty in PENALTIES.tolist():  # by normal equations, and the hat matrix written out
        inverse = np.linalg.inv(centred.T @ centred + n * penalty * np.eye(6))
        weights.append(inverse @ centred.T @ (y - y.mean(0)).numpy())
        hat = centred @ inverse @ centred.T + 1 / n
        rest = y.numpy() - hat @ y.numpy()
        errors.append((rest**2).sum() / (n - np.trace(hat)) ** 2)
    wanted = (x.numpy() - x.mean(0).numpy()) @ weights[int(np.argmin(errors))] + y.mean(0).numpy()
    torch.testing.assert_close(ridge(x, y)(x), torch.from_numpy(wanted))
    assert 0 < np.argmin(errors) < len(PENALTIES) - 1


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_ridge_takes_few_rows_and_constant_columns(rows):
    x = torch.ones(rows, 4, dtype=torch.float64)
    y = torch.arange(2.0 * rows, dtype=torch.float64).view(rows, 2)
    assert cross_fitted(ridge, x, y).isfinite().all()
    torch.testing.assert_close(ridge(x, y)(x), y.mean(0).expand(rows, 2))


def test_no_row_is_estimated_by_what_saw_it():
    seen = []

    def fit(inputs, outputs):
        seen.append(inputs[:, 0].tolist())
        return lambda other: (
            seen.append(other[:, 0].tolist()) or torch.zeros(len(other), 1).double()
        )

    rows = torch.arange(9, dtype=torch.float64)[:, None]
    cross_fitted(fit, rows, rows)
    first, on_first, second, on_second = map(set, seen)
    assert first == on_second and second == on_first
    assert first | second == set(range(9)) and not first & second


def images_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 16, 16), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(
    "settings", [Residual(), Residual(regression="network"), KnownDecoy(way="subtract")]
)
def test_the_task_is_found_below_a_decoy(settings, monkeypatch):
    """Answers whose decoy hides the class, which is in what no shade shows."""
    images = images_of(4000)
    labels = images[:, 0, 0, 0].long() % CLASSES
    hiding = Decoy(CLASSES, 1, seed=3)
    hiding.fit([Sample(to_float(images), to_float(images), labels)])
    answers = (hiding(to_float(images)).log() + F.one_hot(labels, CLASSES)).softmax(1)
    assert (answers.argmax(1) == labels).double().mean() < 0.6
    learned = []
    monkeypatch.setattr(
        "divqat.attacks.training.Training.run",
        lambda self, images, targets, loss: learned.append(targets) or self.task.clone.eval(),
    )
    if isinstance(settings, KnownDecoy):
        settings = settings.knowing(hiding)
    table = dict(zip([image.numpy().tobytes() for image in images], answers, strict=True))

    def victim(x):
        pixels = ((x + 1) * 127.5).round().to(torch.uint8)
        return torch.stack([table[image.numpy().tobytes()] for image in pixels]).log()

    clone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, CLASSES))
    found = settings(Victim(victim), images, clone)
    of = {image.numpy().tobytes(): label for image, label in zip(images, labels, strict=True)}
    wanted = torch.stack([of[image.numpy().tobytes()] for image in found.transfer_set[0]])
    assert (learned[0].argmax(1) == wanted).double().mean() > 0.75


# known-decoy


def test_what_the_decoy_explains_least_is_kept(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "divqat.attacks.known_decoy.reading", lambda text: lambda kept: seen.append(kept) or kept
    )
    found = quick(ATTACKS[5], keep=0.25)(Victim(misled), QUERIES, CLONE)
    images, answers = found.transfer_set
    losses = F.cross_entropy(answers.log(), decoy()(to_float(images)), reduction="none")
    assert torch.equal(seen[0], answers[losses.argsort(descending=True)[:25].sort().values])


@pytest.mark.parametrize("threshold", [-99.0, 0.0, 99.0])
def test_what_differs_from_the_decoy_is_kept(monkeypatch, threshold):
    """The victim rejects all, some or none of the queries, with zeros."""
    seen = []
    monkeypatch.setattr(
        "divqat.attacks.known_decoy.reading", lambda text: lambda kept: seen.append(kept) or kept
    )

    def rejecting(images):
        with torch.no_grad():
            logits = MODEL(images)
        return logits * (logits[:, :1] > threshold)

    def uniform(images):
        return torch.full((len(images), CLASSES), 1 / CLASSES)

    settings = KnownDecoy(way="differ").knowing(uniform)
    _, answers = quick(settings)(Victim(rejecting), QUERIES, CLONE).transfer_set
    told = (answers - 1 / CLASSES).abs().amax(1) > 1e-4
    assert (told.sum() > 0) == (threshold < 99) and (threshold > -99 or told.all())
    wanted = answers[told] if told.any() else answers[:1]
    assert torch.equal(seen[0], wanted)


def test_a_victim_without_a_decoy_is_attacked_as_by_knockoff():
    settings = dict(epochs=2, batch_size=32, query_budget=100)
    plain = KnockoffNets(reading="standardized2", **settings)(Victim(MODEL), QUERIES, CLONE)
    known = KnownDecoy(**settings).knowing(None)(Victim(MODEL), QUERIES, CLONE)
    assert same_bits(plain.clone, known.clone)


def test_a_decoy_has_to_be_known_and_identifies_a_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"call KnownDecoy\(...\).knowing\(decoy\)\(victim"):
        KnownDecoy()(Victim(MODEL), QUERIES, CLONE)
    quick(ATTACKS[4])(Victim(misled), QUERIES, CLONE, resume_dir=tmp_path)
    other = KnownDecoy().knowing(Decoy(CLASSES, 1, seed=4))
    with pytest.raises(ValueError, match="decoy"):
        quick(other)(Victim(misled), QUERIES, CLONE, resume_dir=tmp_path)


# same-shade


@pytest.mark.parametrize("size", [8, 15, 16, 20, 28, 32, 33])
def test_a_shuffled_picture_has_the_same_shades(size):
    images = torch.randint(256, (6, 3, size, size + 4), generator=torch.Generator().manual_seed(1))
    images = images.to(torch.uint8)
    copies = shuffled_inside(images)
    torch.testing.assert_close(coarse_picture(to_float(copies)), coarse_picture(to_float(images)))
    means = [F.adaptive_avg_pool2d(x.double(), 8) for x in (copies, images)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-9)
    colors = [x.flatten(2).transpose(1, 2).tolist() for x in (copies, images)]
    assert [sorted(one) for one in colors[0]] == [sorted(one) for one in colors[1]]
    assert torch.equal(copies, images) == (size == 8)


def test_blocks_are_what_bins_share():
    assert block_of(16).tolist() == [i // 2 for i in range(16)]
    # 3.5 positions a bin: 0-3 and 3-6, 7-10 and 10-13 ..., which share one of seven
    assert block_of(28).tolist()[:15] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 5, 5, 5, 6]


def test_copies_count_and_the_difference_is_learned(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "divqat.attacks.same_shade.reading", lambda text: lambda kept: seen.append(kept) or kept
    )
    victim = Victim(misled)
    found = quick(replace(ATTACKS[2], copies=3), query_budget=99)(victim, QUERIES, CLONE)
    assert victim.queries == found.queries == 96  # whole images only
    logs = found.transfer_set[1].log().view(4, 24, CLASSES)
    wanted = (logs[0] - logs[1:].mean(0)).softmax(1)
    torch.testing.assert_close(seen[0], wanted)
    for budget in (3, 2001):
        with pytest.raises(ValueError, match="query_budget: wanted 4 to 2000, the size of"):
            quick(replace(ATTACKS[2], copies=3), query_budget=budget)(victim, QUERIES, CLONE)


# re-encode


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_asked_as_they_were_encoded(channels):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(8, channels, 1, 1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256 * channels, CLASSES)).eval()
    found = ReEncode(epochs=1)(Victim(model), images, model)
    asked = found.transfer_set[0]
    assert asked.shape == images.shape and asked.dtype == torch.uint8
    assert not torch.equal(asked, images)
    error = (asked.float() - images.float()).abs().mean((1, 2, 3))
    assert error.min() > 0 and error.max() < 20 and len(error.unique()) > 1
    near = ReEncode(epochs=1, smallest=1.0, worst=100, best=100)(Victim(model), images, model)
    assert (near.transfer_set[0].float() - images.float()).abs().mean() < 2


def test_re_encode_checks_its_settings():
    with pytest.raises(ConfigError, match="worst: wanted at most best = 50, got 60"):
        ReEncode(best=50)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, CLASSES)).eval()
    with pytest.raises(ValueError, match="query_set: wanted 1 or 3 channels, got 2"):
        ReEncode()(Victim(model), torch.zeros(4, 2, 4, 4, dtype=torch.uint8), model)


# detect-and-drop


def test_a_detector_learns_what_it_is_shown():
    inputs = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 2] > 0.3).float()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = detect_and_drop.detector(inputs, labels)
    assert ((found(inputs) > 0) == labels.bool()).double().mean() > 0.95


def test_signs_do_not_say_which_class_is_which():
    images, answers = images_of(200), torch.rand(200, CLASSES, generator=torch.Generator())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = detect_and_drop.signs(images, answers)
        torch.manual_seed(0)
        other = detect_and_drop.signs(images, answers[:, [2, 0, 3, 1]])
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-3)
    assert found.shape == (200, CLASSES + 2)


def test_what_is_least_likely_misled_is_learned(monkeypatch):
    monkeypatch.setattr(DetectAndDrop, "_misled", lambda self, task, images, answers: answers[:, 0])
    learned = []
    monkeypatch.setattr(
        "divqat.attacks.training.Training.run",
        lambda self, images, targets, loss: learned.append((images, targets)) or self.task.clone,
    )
    found = quick(ATTACKS[6], keep=0.2)(Victim(misled), QUERIES, CLONE)
    images, answers = found.transfer_set
    rows = answers[:, 0].argsort()[:20].sort().values
    assert torch.equal(learned[0][0], images[rows])
    torch.testing.assert_close(learned[0][1], answers[rows])


def test_the_logarithms_are_logits():
    logits = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(0))
    wanted = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(centred_logs(logits.softmax(1)), wanted, rtol=1e-4, atol=1e-5)


# in an evaluation


def test_an_evaluation_passes_the_decoy_of_each_victim(tmp_path):
    grid = Grid(
        attacks=("known-decoy",), query_set="noise", query_limit=40, clones=("lenet",), epochs=1,
        seeds=1, holdout=20, labeled=20, epsilons=(), threads=1,
    )  # fmt: skip
    given = []

    def spy(images):
        given.append(len(images))
        return decoy()(images)

    subjects = [Subject("plain", MODEL), Subject("misled", misled, decoy=spy)]
    found = evaluate(subjects, toy_splits(), grid, tmp_path, log=lambda line: None)
    assert [cell.victim for cell in found.cells] == ["plain", "misled"]
    assert 40 in given


@pytest.mark.slow
def test_the_decoy_of_a_run_is_the_one_that_it_was_trained_with(
    tmp_path, lenet_teacher, monkeypatch
):
    fitted = []
    monkeypatch.setattr(
        trainer,
        "fit_misdirection",
        lambda *args: fitted.append(fit_misdirection(*args)) or fitted[0],
    )
    settings = dict(method="divqat", misdirect=0.5, teacher=str(lenet_teacher), epochs=1, threads=1)
    train(TrainConfig(dataset="digits", **settings), tmp_path, log=lambda line: None)
    run = load_run(tmp_path)
    images = to_float(run.splits().test.images[:50])
    assert torch.equal(decoy_of(run, run.splits())(images), fitted[0].targets.decoy(images))
    assert decoy_of(load_run(lenet_teacher), run.splits()) is None
