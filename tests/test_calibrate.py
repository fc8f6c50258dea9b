from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from testing import randn, tensor
from torch import nn

from divqat._util.settings import option
from divqat.data import ImageSet
from divqat.defenses import Defense, Owner
from divqat.defenses.adaptive_misinformation import AdaptiveMisinformation
from divqat.defenses.calibrate import calibrated, l1_distance
from divqat.defenses.dcp import DCP
from divqat.defenses.keep import LabelOnly
from divqat.defenses.random_noise import RandomNoise
from divqat.defenses.reverse_sigmoid import ClampedReverseSigmoid, ReverseSigmoid
from divqat.defenses.temperature import Temperature

PROBS = (3 * randn(1000, 6)).softmax(1)
IMAGES = randn(1000, 1, 2, 2, seed=1).tanh()


def test_l1_distance():
    a, b = tensor([[0.5, 0.5], [1.0, 0.0]]), tensor([[0.25, 0.75], [0.0, 1.0]])
    assert l1_distance(a, b) == (0.5 + 2) / 2
    assert l1_distance(a, a) == 0


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_l1_distance_of_what_has_none(shapes):
    with pytest.raises(ValueError, match="a, b: wanted the same"):
        l1_distance(*map(torch.ones, shapes))


@pytest.mark.parametrize("l1", [0.1, 0.4])
@pytest.mark.parametrize(
    "defense",
    [
        RandomNoise(seed=3),
        ReverseSigmoid(gamma=0.5),
        ClampedReverseSigmoid(beta=9, gamma=0.1),
        DCP(nu=500),
        Temperature(temperature=0.5),
    ],
)
def test_distance_is_the_wanted_one_and_other_settings_stay(defense, l1):
    found = calibrated(defense, PROBS, IMAGES, l1, tolerance=1e-4)
    assert abs(l1_distance(found(PROBS, IMAGES), PROBS) - l1) <= 1e-4
    strength = getattr(found, defense.strength)
    assert strength > defense.neutral
    # what came back is an ordinary, valid defense
    assert found == replace(defense, **{defense.strength: strength})


def test_strength_of_noise_is_the_one_of_its_formula():
    released = RandomNoise(epsilon=2)(PROBS, IMAGES)
    at_two = l1_distance(released, PROBS)
    found = calibrated(RandomNoise(), PROBS, IMAGES, 0.3, tolerance=1e-6)
    assert found.epsilon == pytest.approx(2 * 0.3 / at_two, abs=1e-5)


def test_fitted_defense_stays_fitted():
    owner = Owner(
        ImageSet(torch.arange(64 * 4, dtype=torch.uint8).view(64, 1, 2, 2), torch.arange(64) % 6),
        None,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 6)),
    )
    fitted = AdaptiveMisinformation(epochs=1).fit(owner)
    found = calibrated(fitted, PROBS, IMAGES, 0.5)
    assert abs(l1_distance(found(PROBS, IMAGES), PROBS) - 0.5) <= 1e-3
    assert 0.2 < found.tau < 1
    assert fitted.tau == 0.9


def test_what_cannot_be_reached_is_told():
    most = l1_distance(RandomNoise(epsilon=2)(PROBS, IMAGES), PROBS)
    with pytest.raises(ValueError, match=rf"wanted 0 to {most:.4g}.*epsilon=2, got 1.99"):
        calibrated(RandomNoise(), PROBS, IMAGES, 1.99)
    even = (PROBS - 1 / 6).abs().sum(1).double().mean().item()  # of an endless temperature
    assert abs(even - most) > 0.01
    with pytest.raises(ValueError, match=rf"wanted 0 to {even:.3g}\d*, which Temperature reaches"):
        calibrated(Temperature(), PROBS, IMAGES, even + 0.01)
    assert calibrated(Temperature(), PROBS, IMAGES, even - 0.01).temperature > 10
    with pytest.raises(ValueError, match="l1: wanted 0 to"):
        calibrated(Temperature(), PROBS, IMAGES, -0.1)
    with pytest.raises(ValueError, match="whose strength can be set, got LabelOnly"):
        calibrated(LabelOnly(), PROBS, IMAGES, 0.1)


@dataclass(frozen=True, kw_only=True)
class Step(Defense):
    """Uniform from a strength of 0.3 on, and only for the first call of its life."""

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = "power"
    power: float = option(0.0, "Strength.", least=0, most=1)

    def fit(self, owner):
        fitted = super().fit(owner)
        object.__setattr__(fitted, "calls", [])
        return fitted

    def __call__(self, probs, images):
        self.calls.append(len(probs))
        on = self.power >= 0.3 and len(self.calls) == 1
        return torch.full_like(probs, 1 / probs.shape[1]) if on else probs


def test_no_strength_between_and_no_memory_of_the_search():
    step = Step().fit(None)
    most = l1_distance(torch.full_like(PROBS, 1 / 6), PROBS)
    with pytest.raises(ValueError, match=rf"at power=0\.3 it jumps from 0 to {most:.4g}, got 0.2"):
        calibrated(step, PROBS, IMAGES, 0.2)
    found = calibrated(step, PROBS, IMAGES, most)
    assert found.power >= 0.3 and found.calls == step.calls == []
