"""MISLEADER: a distillation against a simulated thief that learns."""

import copy
import math

import pytest
import torch
from captured import host_reads, replay_steps, tape
from test_train import QUIET, assert_equal, assert_same
from testing import seeded
from torch import nn
from torch.nn import functional as F
from trainings import TINY, train_interrupted

from divqat._util.files import load_checkpoint
from divqat._util.settings import ConfigError
from divqat.nn.misleader import CLIP, Misleader
from divqat.train import TrainConfig, load_run, step, train
from divqat.train.distributed import World
from divqat.train.network import build_model
from divqat.train.objective import Objective, build_thief
from divqat.train.optimizer import build_sgd
from divqat.train.proxies import Proxies
from divqat.train.step import Step

SETTINGS = dict(dataset="digits", model="lenet", batch_size=256, epochs=2, threads=1)
SHAPE = dict(in_channels=1, num_classes=10, image_size=[8, 8])
CPU = torch.device("cpu")
LEARNING = dict(lr=0.01, momentum=0.9, weight_decay=5e-4)
CLASSES = 5
pytestmark = pytest.mark.usefixtures("one_thread")


def config(teacher="teacher", **changes):
    teacher = None if teacher is None else str(teacher)
    strong = dict(misleader_lambda=0.05, misleader_steps=2, method="misleader")
    return TrainConfig(**{**SETTINGS, **strong, "teacher": teacher, **changes})


def linear():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))


def batch(scale=1.0):
    """float64 images, the labels of the first six, and a victim's logits."""
    generator = seeded()
    images = scale * torch.rand(10, 1, 8, 8, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(10, CLASSES, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (6,), generator=generator), logits


@pytest.fixture(scope="module")
def fp(tmp_path_factory):
    """The run folder of the target."""
    folder = tmp_path_factory.mktemp("fp") / "fp"
    train(TrainConfig(**SETTINGS), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def misleader(fp, tmp_path_factory):
    """The run folder of a training."""
    folder = tmp_path_factory.mktemp("misleader") / "misleader"
    train(config(fp), folder, **QUIET)
    return folder


def test_the_term_and_its_gradient_by_hand():
    images, _, logits = batch()
    thief, weight = linear().double(), 0.7
    term = Misleader(thief, None, weight, 1)
    z = logits.clone().requires_grad_()
    found = term(z, images)
    found.backward()
    assert all(value.grad is None for value in thief.parameters())
    p, q = logits.softmax(1), thief(images).detach().softmax(1)
    kl = (p * (p / q).log()).sum(1, keepdim=True)
    torch.testing.assert_close(found.detach(), -weight * kl.mean())
    torch.testing.assert_close(z.grad, -weight * p * ((p / q).log() - kl) / len(p))


@pytest.mark.parametrize(("scale", "clipped"), [(1.0, False), (30.0, True)])
def test_the_thief_learns_by_hand(scale, clipped):
    """SGD on ∇_W KL(p‖q) = (q − p)^T x / N, ∇_b its mean; against the clip, with momentum."""
    images, _, logits = batch(scale)
    thief = linear().double()
    x, p = images.flatten(1), logits.softmax(1)
    weights = [value.detach().clone() for value in thief[1].parameters()]
    speeds = [torch.zeros_like(value) for value in weights]
    norms = []
    for _ in range(3):
        away = ((x @ weights[0].T + weights[1]).softmax(1) - p) / len(x)
        gradients = [away.T @ x, away.sum(0)]
        norms.append(math.sqrt(sum((g * g).sum() for g in gradients)))
        for w, g, speed in zip(weights, gradients, speeds, strict=True):
            g = g * min(1.0, CLIP / norms[-1]) + 5e-4 * w
            speed.mul_(0.9).add_(g)
            w.sub_(0.01 * speed)
    assert all((norm > CLIP) == clipped for norm in norms)
    rest = torch.get_rng_state()
    term = Misleader(thief, build_sgd(thief.parameters(), CPU, **LEARNING), 1.0, 3)
    logits.requires_grad_()
    term.learn(logits, images)
    assert logits.grad is None and torch.equal(torch.get_rng_state(), rest)
    # clip_grad_norm_ divides by the norm + 1e-6
    torch.testing.assert_close([*thief[1].parameters()], weights, rtol=1e-5, atol=1e-7)


def test_a_step_is_the_formula():
    model, teacher, thief = linear(), linear(), linear()
    for network, factor in ((teacher, 3), (thief, -1)):
        nn.init.orthogonal_(network[1].weight, gain=factor)
    images, labels, _ = batch()
    alpha, T, weight = 0.4, 3.0, 0.7
    settings = config(weight=alpha, temperature=T, misleader_lambda=weight)
    twin, goal, learned = (copy.deepcopy(net).double() for net in (model, teacher, thief))
    term = Misleader(thief, build_sgd(thief.parameters(), CPU, **LEARNING), weight, 2)
    objective = Objective(settings, settings, World(), [*model.parameters()], 0, thief=term)
    do = Step(model, teacher, labels, World(), objective, settings, settings)
    result = do(images[:6].float(), torch.arange(6), images[6:].float(), total=6)

    z = twin(images)
    optimizer = build_sgd(learned.parameters(), CPU, **LEARNING)
    Misleader(learned, optimizer, weight, 2).learn(z[6:], images[6:])
    assert not torch.equal(learned[1].weight, linear()[1].weight.double())

    def kl(p, q):
        return (p * (p / q).log()).sum(1).mean()

    ce = F.cross_entropy(z[:6], labels)
    target = kl((goal(images[:6]).detach() / T).softmax(1), (z[:6] / T).softmax(1))
    away = kl(z[6:].softmax(1), learned(images[6:]).detach().softmax(1))
    loss = (1 - alpha) * ce + alpha * T**2 * target - weight * away
    wanted = torch.autograd.grad(loss, twin.parameters())
    found = [value.grad.double() for value in model.parameters()]
    torch.testing.assert_close(found, [*wanted], rtol=1e-4, atol=1e-6)
    sums = 6 * torch.stack([loss, ce, target]).detach()
    torch.testing.assert_close(result[:3], sums, rtol=1e-5, atol=1e-6)
    assert result[3:].tolist() == [0, 0, 1, 1, 1]


def test_the_thief_starts_elsewhere_and_follows_the_learning_rate():
    one, same, other = (build_thief(config(), "lenet", seed, SHAPE, CPU) for seed in (0, 0, 1))
    assert_equal(one.thief.state_dict(), same.thief.state_dict())
    weights = [net.features[0][0].weight for net in (one.thief, other.thief)]
    weights.append(build_model(config(), SHAPE).features[0][0].weight)
    assert not any(torch.equal(weights[i], weights[i - 1]) for i in range(3))
    assert build_thief(config(misleader_lambda=0), "lenet", 0, SHAPE, CPU) is None
    objective = Objective(config(misleader_lr=0.2), config(), World(), [], 0, thief=one)
    objective.start_step(0, 0.25)
    torch.testing.assert_close(one.optimizer.param_groups[0]["lr"], torch.tensor(0.05))


@pytest.mark.slow
def test_with_zero_weights_it_is_plain_training_bit_for_bit(fp, tmp_path):
    train(config(fp, weight=0.0, misleader_lambda=0.0, proxy_share=2.0), tmp_path, **QUIET)
    assert_same(tmp_path, fp)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(fp, misleader, tmp_path):
    train_interrupted(config(fp), tmp_path, 1)
    assert_same(tmp_path, misleader)
    found, wanted = (
        load_checkpoint(folder / "checkpoint.pt")["thief"] for folder in (tmp_path, misleader)
    )
    assert_equal(found["model"], wanted["model"])
    assert_equal(found["optimizer"]["state"], wanted["optimizer"]["state"])
    start = build_thief(config(), "lenet", 0, SHAPE, CPU).thief.state_dict()
    assert not torch.equal(found["model"]["features.0.0.weight"], start["features.0.0.weight"])
    for row in load_checkpoint(misleader / "checkpoint.pt")["rows"]:
        assert row["divergence"] > 0 and "misled" not in row


@pytest.mark.slow
def test_a_replayed_step_gives_the_same_bits(fp, misleader, tmp_path, monkeypatch):
    replay_steps(monkeypatch, tape)
    train(config(fp), tmp_path, **QUIET)
    assert_same(tmp_path, misleader)


@pytest.mark.slow
def test_a_step_has_no_host_sync(fp, tmp_path, monkeypatch):
    seen = host_reads(monkeypatch, step.Step, Proxies)
    train(config(fp, epochs=1, precision="bfloat16"), tmp_path, **QUIET)
    assert len(seen) == 2 * 6 and not any(seen)


@pytest.mark.slow
def test_another_network_than_the_targets(fp, tmp_path):
    changes = dict(model=TINY, epochs=1, misleader_steps=1)
    train(config(fp, **changes), tmp_path, **QUIET)
    assert (
        load_checkpoint(tmp_path / "checkpoint.pt")["model"].keys()
        != load_run(fp).model.state_dict().keys()
    )
    with pytest.raises(ValueError, match=r"validation_fraction: wanted 0.1 as in"):
        train(config(fp, **changes, validation_fraction=0.2), tmp_path / "other", **QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(teacher=None), "teacher: wanted the run folder of a full-precision training with"),
        (dict(misleader_lambda=-1), "misleader_lambda: wanted a number at least 0, got -1"),
        (dict(misleader_steps=0), "misleader_steps: wanted a whole number at least 1, got 0"),
        (dict(misleader_lr=0), "misleader_lr: wanted a number above 0, got 0"),
        (dict(weight=1.5), "weight: wanted at most 1 with misleader, .* got 1.5"),
        (dict(accumulate=2), "one process and accumulate = 1 with misleader, .*got 1 and 2"),
        (dict(misdirect=0.1), "misdirect: wanted 0 with a method other than divqat"),
        (dict(proxies=("folder",)), "proxy_root: wanted a folder if proxies include 'folder'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**{"teacher": "t", **settings})


def test_defaults_are_the_published_ones():
    found = TrainConfig(**SETTINGS, method="misleader", teacher="t")
    assert (found.weight, found.temperature, found.direction) == (0.3, 6.0, "teacher_student")
    assert (found.misleader_lambda, found.misleader_steps, found.misleader_lr) == (0.001, 5, 0.01)
    assert found.proxies == ("augmented",) and found.proxy_count(128) == 64
    assert TrainConfig.from_dict(found.to_dict()) == found
    assert found.uses_proxies and not config(misleader_lambda=0).uses_proxies
    with pytest.raises(ConfigError, match="one process and accumulate = 1 with misleader"):
        found.check_world_size(2)
