import pytest
import torch
from toys import QUERIES, same_bits, toy_model, toy_victim

from divqat._util.settings import ConfigError
from divqat.attacks import KnockoffNets, Sift
from divqat.attacks.sift import DECAY, decoy_likelihood
from divqat.data import to_float
from divqat.nn.decoy import coarse_picture
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("one_thread")
CLONE = toy_model(seed=1)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 8, 8), generator=generator).to(torch.uint8)


@pytest.mark.slow
def test_the_regression_is_at_its_minimum():
    """In float64, by the gradient of softmax regression: X^T (P − Y) / n + 2 · decay · W = 0."""
    images = pictures(300)
    answers = torch.rand(300, 4, generator=torch.Generator().manual_seed(1))
    found = decoy_likelihood(images, answers)
    inputs = torch.cat([coarse_picture(to_float(images)).double(), torch.ones(300, 1).double()], 1)
    weight = torch.zeros(65, 4).double()
    hit = torch.nn.functional.one_hot(answers.argmax(1), 4).double()
    for _ in range(40000):  # plain gradient descent
        gradient = inputs.T @ ((inputs @ weight).softmax(1) - hit) / 300 + 2 * DECAY * weight
        weight -= 2 * gradient
    assert gradient.abs().max() < 1e-8
    wanted = (inputs @ weight).log_softmax(1)[torch.arange(300), answers.argmax(1)]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_what_a_decoy_answers_is_left_out():
    images = pictures(8000)
    shades = coarse_picture(to_float(images))
    decoy = (shades @ torch.randn(64, 4, generator=torch.Generator().manual_seed(2))).argmax(1)
    honest = torch.arange(8000) % 10 == 0
    answers = torch.eye(4)[torch.where(honest, (decoy + 2) % 4, decoy)]
    least = decoy_likelihood(images, answers).argsort()[:800]
    assert honest[least].double().mean() > 0.8


def test_all_are_asked_and_a_share_is_learned(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "divqat.attacks.knockoff.reading", lambda text: lambda kept: seen.append(kept) or kept
    )
    victim = Victim(model, query_budget=100)
    found = Sift(epochs=1, query_budget=100, batch_size=16, keep=0.25)(victim, QUERIES, CLONE)
    images, answers = found.transfer_set
    assert found.queries == victim.queries == len(images) == len(answers) == 100
    rows = decoy_likelihood(images, answers).argsort()[:25].sort().values
    assert torch.equal(seen[0], answers[rows])


def test_keeping_all_is_knockoff(model):
    settings = dict(epochs=2, query_budget=100, batch_size=32)
    plain = KnockoffNets(**settings)(Victim(model), QUERIES, CLONE).clone
    assert same_bits(Sift(keep=1.0, **settings)(Victim(model), QUERIES, CLONE).clone, plain)
    assert not same_bits(Sift(**settings)(Victim(model), QUERIES, CLONE).clone, plain)


@pytest.mark.parametrize("keep", [0, 1.01, "half"])
def test_share_is_checked(keep):
    with pytest.raises(ConfigError, match="keep: wanted a number above 0 at most 1, got"):
        Sift(keep=keep)
