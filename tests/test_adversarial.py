"""FGSM and PGD, beside a closed form and the Adversarial Robustness Toolbox."""

import copy

import numpy as np
import pytest
import torch
from testing import randn, seeded
from torch import nn
from toys import CLASSES, TEST_IMAGES, TEST_LABELS, toy_model, toy_victim

from divqat import prepare
from divqat._util.devices import fingerprint
from divqat.data import to_float
from divqat.metrics import accuracy, fgsm, pgd

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = to_float(TEST_IMAGES)
EPSILON = 1 / 32  # exact in float32


@pytest.fixture(scope="module")
def model():
    return toy_victim()


def correct(model, images):
    with torch.no_grad():
        return accuracy(model(images), TEST_LABELS)


def linear(weight):
    """Two classes: (w · x, 0)."""
    layer = nn.Linear(weight.numel(), 2, bias=False, dtype=torch.float64)
    layer.weight.data = torch.stack([weight, torch.zeros_like(weight)])
    return nn.Sequential(nn.Flatten(), layer).eval()


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_of_a_linear_model(attack):
    """The gradient of class 0's loss is -(1 - p) w: all pixels move to the border of the ball
    against w, for class 1 along it; where w is 0 FGSM leaves them."""
    weight = torch.tensor([1.5, -0.25, 0.0, 3.0], dtype=torch.float64)
    images = torch.tensor([[0.1, -0.2, 0.3, 0.4], [0.9, 0.95, -1.0, -0.95]], dtype=torch.float64)
    images = images.view(2, 1, 2, 2)
    got = attack(linear(weight), images, torch.tensor([0, 1]), 0.1).view(2, 4)
    wanted = torch.tensor([[-0.1, 0.0, 0.3, 0.2], [1.0, 0.75, -1.0, -0.75]], dtype=torch.float64)
    decided = weight != 0
    torch.testing.assert_close(got[:, decided], wanted[:, decided], rtol=0, atol=1e-15)
    if attack is fgsm:
        assert torch.equal(got[:, ~decided], wanted[:, ~decided])


def test_steps_of_pgd_by_hand():
    """From any start two steps of 0.6 ε cannot cross the ball; five of 0.4 ε can."""
    weight = torch.ones(4, dtype=torch.float64)
    images, label = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.tensor([1])
    noise = torch.rand(1, 1, 2, 2, generator=seeded(5), dtype=torch.float64)
    start = 0.2 * (2 * noise - 1)
    short = pgd(linear(weight), images, label, 0.1, steps=2, alpha=0.03, seed=5)
    torch.testing.assert_close(short, (start + 0.12).clamp(max=0.2), rtol=0, atol=1e-15)
    long = pgd(linear(weight), images, label, 0.1, steps=5, alpha=0.04, seed=5)
    torch.testing.assert_close(long, torch.full_like(images, 0.2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize("epsilon", [0.0, EPSILON, 8 / 255, 1.0])
def test_images_stay_in_the_ball_and_in_range(model, attack, epsilon):
    images = IMAGES.clone()
    images[0], images[1] = 1.0, -1.0
    moved = attack(model, images, TEST_LABELS, epsilon)
    assert moved.dtype == torch.float32 and moved.shape == images.shape
    assert (moved - images).abs().max() <= 2 * epsilon + 1e-7
    assert moved.abs().max() <= 1
    assert torch.equal(moved, images) == (epsilon == 0)


def test_pgd_is_the_stronger_one(model):
    clean = correct(model, IMAGES)
    once = correct(model, fgsm(model, IMAGES, TEST_LABELS, EPSILON))
    often = [correct(model, pgd(model, IMAGES, TEST_LABELS, EPSILON, seed=s)) for s in range(3)]
    assert clean > 0.9 and once < clean - 0.1
    assert np.mean(often) <= once
    noise = 2 * EPSILON * randn(*IMAGES.shape).sign()  # as far, anywhere
    assert correct(model, (IMAGES + noise).clamp(-1, 1)) > once + 0.1


def test_seeds_and_batches(model):
    some, labels = IMAGES[:30], TEST_LABELS[:30]
    one = pgd(model, some, labels, EPSILON, steps=1, seed=1)
    assert torch.equal(one, pgd(model, some, labels, EPSILON, steps=1, seed=1))
    assert not torch.equal(one, pgd(model, some, labels, EPSILON, steps=1, seed=2))
    # other batches may round other bits of a gradient, whose sign rarely is at stake
    same = one == pgd(model, some, labels, EPSILON, steps=1, seed=1, batch_size=7)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("quantized", [False, True])
def test_the_model_stays_as_it_is(model, quantized):
    victim = copy.deepcopy(model)
    if quantized:
        victim = prepare(victim.train(), "x86", IMAGES[:2])
        victim(IMAGES)  # the ranges
        victim.eval()
    before = fingerprint(victim.state_dict())
    images = IMAGES.clone()
    with torch.no_grad():  # a caller's own affair
        moved = pgd(victim, images, TEST_LABELS, EPSILON)
    assert fingerprint(victim.state_dict()) == before and torch.equal(images, IMAGES)
    assert all(p.grad is None and p.requires_grad for p in victim.parameters())
    assert not any(module.training for module in victim.modules())
    assert correct(victim, moved) < correct(victim, IMAGES) - 0.1


@pytest.mark.slow
def test_fgsm_of_art_is_ours(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # ART writes to the home folder when imported
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        evasion = pytest.importorskip("art.attacks.evasion", reason="needs divqat[art]")
        estimators = pytest.importorskip("art.estimators.classification")
    classifier = estimators.PyTorchClassifier(
        copy.deepcopy(model), nn.CrossEntropyLoss(), (1, 8, 8), CLASSES, clip_values=(-1.0, 1.0)
    )
    attack = evasion.FastGradientMethod(classifier, eps=2 * EPSILON, batch_size=50)
    theirs = attack.generate(IMAGES.numpy(), TEST_LABELS.numpy())
    ours = fgsm(model, IMAGES, TEST_LABELS, EPSILON, batch_size=50)
    assert not torch.equal(ours, IMAGES)
    assert torch.equal(torch.from_numpy(theirs), ours)


class Rounded(nn.Module):
    def forward(self, x):
        return x.flatten(1).detach()


class Broken(nn.Module):
    def forward(self, x):
        return x.flatten(1).abs().sqrt()  # has no slope at 0


def test_mistakes_are_named(model):
    some, labels = IMAGES[:4], TEST_LABELS[:4]
    for arguments, kind, message in [
        ((toy_model().train(), some, labels, 0.1), ValueError, "training mode"),
        ((lambda x: x, some, labels, 0.1), TypeError, r"model: wanted an nn\.Module, got function"),
        ((model, TEST_IMAGES[:4], labels, 0.1), TypeError, "images: wanted floats in .*uint8"),
        ((model, 2 * some, labels, 0.1), ValueError, r"images: wanted floats in \[-1, 1\], got -"),
        ((model, some[:0], labels[:0], 0.1), ValueError, "N of at least 1"),
        ((model, some / 0, labels, 0.1), ValueError, "finite"),
        ((model, some, labels[:3], 0.1), ValueError, "one per image"),
        ((model, some, labels, -0.1), ValueError, "epsilon: wanted 0 to 1.* got -0.1"),
        ((model, some, labels, float("nan")), ValueError, "epsilon: wanted 0 to 1.* got nan"),
        ((Rounded().eval(), some, labels, 0.1), ValueError, "gradient at the images, Rounded"),
        ((Broken().eval(), 0 * some, labels, 0.1), FloatingPointError, "NaN or Inf in the grad"),
    ]:
        for attack in (fgsm, pgd):
            if attack is pgd and kind is FloatingPointError:
                continue  # it starts elsewhere
            with pytest.raises(kind, match=message):
                attack(*arguments)
    for settings, message in [
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
        ({"steps": 0}, "steps: wanted at least 1, got 0"),
        ({"alpha": 0.0}, r"alpha: wanted above 0, got 0\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pgd(model, some, labels, 0.1, **settings)
