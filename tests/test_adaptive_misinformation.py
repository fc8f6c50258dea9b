from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from simplex import ROWS, answers, is_simplex
from testing import tensor
from torch import nn
from toys import QUERIES, TEST_IMAGES, TEST_LABELS, same_bits, toy_images, toy_victim

from divqat._util.seeds import derived_seed
from divqat.data import ImageSet, to_float
from divqat.defenses import Owner
from divqat.defenses.adaptive_misinformation import AdaptiveMisinformation, misinformation_loss
from divqat.defenses.network import train_network
from divqat.metrics import accuracy
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_OF_THEM = AdaptiveMisinformation(tau=2.0, epochs=5, lr=0.05)


def unseeded_model():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.fixture(scope="module")
def owner():
    return Owner(ImageSet(*toy_images(800, seed=1)), toy_victim(), unseeded_model)


@pytest.fixture(scope="module")
def wrong(owner):
    """A defense that answers with its network alone."""
    return ALL_OF_THEM.fit(owner)


def test_network_avoids_the_right_class(owner, wrong):
    plain = Victim(owner.model)(to_float(TEST_IMAGES))
    released = Victim(owner.model, defense=wrong)(to_float(TEST_IMAGES))
    assert accuracy(plain, TEST_LABELS) > 0.9 and accuracy(released, TEST_LABELS) < 0.02
    assert not wrong.keeps_top1


def test_gate_mixes_by_confidence(owner, wrong):
    probs = tensor([[0.7, 0.1, 0.1, 0.1], [0.8, 0.2, 0, 0], [0.9, 0.1, 0, 0]])
    images = to_float(TEST_IMAGES[:3])
    network = wrong(probs, images)
    # nu = 10 ln 3: a = 3/4, 1/2, 1/4 for s = tau - 0.1, tau, tau + 0.1
    gated = replace(ALL_OF_THEM, tau=0.8, nu=10.986122886681098).fit(owner)
    share = tensor([[0.75], [0.5], [0.25]])
    torch.testing.assert_close(gated(probs, images), (1 - share) * probs + share * network)
    hard = replace(ALL_OF_THEM, tau=0.8).fit(owner)(probs, images)
    torch.testing.assert_close(hard[0], network[0])
    torch.testing.assert_close(hard[2], probs[2])


@settings(deadline=None, max_examples=40)
@given(answers(most=4).filter(lambda asked: asked[0].shape[1] == 4))
def test_answers_are_distributions(wrong, asked):
    images = to_float(QUERIES[:ROWS])
    assert is_simplex(wrong(asked[0], images))


def test_fit_depends_on_the_seed_of_the_owner_alone(owner, wrong):
    before = torch.get_rng_state()
    images, probs = to_float(QUERIES), torch.full((len(QUERIES), 4), 0.25)
    again = ALL_OF_THEM.fit(owner)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again(probs, images), wrong(probs, images))
    other = ALL_OF_THEM.fit(replace(owner, seed=1))
    assert not torch.equal(other(probs, images), wrong(probs, images))
    with pytest.raises(RuntimeError, match=r"call fit\(owner\) first"):
        ALL_OF_THEM(probs, images)


def test_answers_do_not_depend_on_the_batch(owner, wrong):
    images = to_float(QUERIES[:50])
    gated = replace(ALL_OF_THEM, tau=0.9).fit(owner)
    small, large = (Victim(owner.model, defense=gated, batch_size=size) for size in (7, 50))
    torch.testing.assert_close(small(images), large(images), rtol=0, atol=1e-4)
    assert torch.equal(small(images), small(images)) and small.queries == 150


def test_last_batch_of_one_image_is_left_out_for_batch_norm(owner):
    def build():
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4))

    odd = replace(owner, train=owner.train.subset(slice(65)), build=build)
    assert is_simplex(ALL_OF_THEM.fit(odd)(torch.full((1, 4), 0.25), to_float(QUERIES[:1])))


def test_no_epochs_leave_the_initial_weights(owner):
    network = train_network(owner, misinformation_loss, epochs=0, batch_size=32, lr=0.1)
    with torch.random.fork_rng([]):
        torch.manual_seed(derived_seed(owner.seed, "defense"))
        assert same_bits(network, unseeded_model())
    assert not network.training


def test_loss_that_is_not_finite(owner):
    with pytest.raises(FloatingPointError, match=r"defense's loss is nan in epoch 1; lower lr"):
        replace(ALL_OF_THEM, lr=1e30).fit(owner)
