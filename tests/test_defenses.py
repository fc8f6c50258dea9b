"""What holds for every defense in closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simplex import ROWS, answers, is_simplex, top_stays
from testing import randn, tensor

from divqat._util.settings import ConfigError
from divqat.defenses.dcp import DCP
from divqat.defenses.keep import LabelOnly, Rounding, TopK
from divqat.defenses.random_noise import RandomNoise
from divqat.defenses.reverse_sigmoid import ClampedReverseSigmoid, ReverseSigmoid
from divqat.defenses.stingy import Stingy
from divqat.defenses.temperature import Temperature
from divqat.victim import Victim

quick = settings(deadline=None, max_examples=60)
amplitudes = st.floats(0, 4)
gammas = st.floats(0.01, 3)
ANY = {
    RandomNoise: st.builds(RandomNoise, epsilon=st.floats(0, 2), seed=st.integers(0, 9)),
    ReverseSigmoid: st.builds(ReverseSigmoid, beta=amplitudes, gamma=gammas),
    ClampedReverseSigmoid: st.builds(ClampedReverseSigmoid, beta=amplitudes, gamma=gammas),
    DCP: st.builds(DCP, beta=amplitudes, gamma=gammas, nu=st.floats(1, 1e4)),
    Temperature: st.builds(Temperature, temperature=st.floats(0.05, 1000)),
    LabelOnly: st.builds(LabelOnly),
    TopK: st.builds(TopK, k=st.integers(1, 2)),
    Stingy: st.builds(Stingy, k=st.integers(1, 2)),
    Rounding: st.builds(Rounding, decimals=st.integers(0, 7)),
}
STRONGER = [(cls, st.floats(0, 2)) for cls in (RandomNoise, ReverseSigmoid, DCP)]
STRONGER += [(ClampedReverseSigmoid, st.floats(0, 50)), (Temperature, st.floats(1, 50))]
every_defense = pytest.mark.parametrize("cls", ANY, ids=lambda cls: cls.__name__)


@every_defense
def test_answers_are_distributions_and_the_clean_ones_stay(cls):
    @quick
    @given(ANY[cls], answers())
    def check(defense, asked):
        probs, images = asked
        before = probs.clone()
        released = defense(probs, images)
        assert released.shape == probs.shape and is_simplex(released)
        assert torch.equal(probs, before)
        if cls.keeps_top1:
            assert top_stays(released, probs)

    check()


@pytest.mark.parametrize("cls", [LabelOnly, TopK, Stingy])
def test_ties_go_to_the_lower_class(cls):
    @quick
    @given(ANY[cls], answers(["tied", "uniform", "one-hot"]))
    def check(defense, asked):
        probs, images = asked
        lowest = [row.index(max(row)) for row in probs.tolist()]
        assert [row.index(max(row)) for row in defense(probs, images).tolist()] == lowest

    check()


# For every defense that says so, an answer whose label it changes.
FLIPS = [
    (RandomNoise(epsilon=1.2), [0.5, 0.3, 0.2]),
    (ReverseSigmoid(), [0.45, 0.35, 0.2, 0.0]),
    (ReverseSigmoid(beta=3.0, gamma=1.0), [0.9, 0.1]),
    (ClampedReverseSigmoid(), [0.45, 0.35, 0.2, 0.0]),
    (DCP(beta=1.0), [0.45, 0.35, 0.2, 0.0]),
    (Rounding(decimals=1), [0.33, 0.34, 0.33]),
]


@pytest.mark.parametrize(("defense", "row"), FLIPS)
def test_label_that_changes(defense, row):
    probs = tensor([row])
    assert not defense.keeps_top1
    assert defense(probs, torch.zeros(1, 1, 2, 2)).argmax() != probs.argmax()


def test_only_those_defenses_change_labels():
    assert {type(defense) for defense, _ in FLIPS} == {cls for cls in ANY if not cls.keeps_top1}


@pytest.mark.parametrize("cls", [ReverseSigmoid, ClampedReverseSigmoid, DCP])
def test_class_above_one_half_stays_the_top_for_moderate_settings(cls):
    @quick
    @given(st.floats(0, 1), st.floats(0.01, 1), answers(["soft", "confident", "one-hot", "tiny"]))
    def check(beta, gamma, asked):
        probs, images = asked
        sure = probs.amax(1) > 0.5
        released = cls(beta=beta, gamma=gamma)(probs, images)
        assert top_stays(released[sure], probs[sure], slack=1e-6)

    check()


@quick
@given(st.floats(0, 2), answers())
def test_noise_is_bounded_and_goes_to_one_other_class(epsilon, asked):
    probs, images = asked
    change = RandomNoise(epsilon=epsilon)(probs, images) - (1 - epsilon / 2) * probs
    assert ((change.abs() > 1e-6).sum(1) <= 1).all()
    if epsilon > 0.01:
        j = change.argmax(1)
        assert (j != probs.argmax(1)).all()
        # |y' - y|_1 = epsilon (1 - y_j)
        distance = (change - epsilon / 2 * probs).abs().sum(1)
        wanted = epsilon * (1 - probs.gather(1, j[:, None])[:, 0])
        torch.testing.assert_close(distance, wanted, atol=1e-5, rtol=0)
        assert (distance <= epsilon + 1e-5).all()


@pytest.mark.parametrize(("cls", "strengths"), STRONGER, ids=[c.__name__ for c, _ in STRONGER])
def test_distance_grows_with_strength_from_nothing(cls, strengths):
    @quick
    @given(strengths, strengths, answers(["soft", "confident", "tied"]))
    def check(a, b, asked):
        probs, images = asked
        distances = [
            (cls(**{cls.strength: strength})(probs, images) - probs).abs().sum(1)
            for strength in (cls.neutral, *sorted((a, b)))
        ]
        assert (distances[0] < 1e-5).all()
        assert (distances[1] <= distances[2] + 1e-5).all()

    check()


@every_defense
def test_an_image_gets_the_same_answer_in_any_company(cls):
    defense = cls()
    probs, images = randn(ROWS, 10).softmax(1), randn(ROWS, 1, 2, 2, seed=1)
    released = defense(probs, images)
    assert torch.equal(defense(probs, images), released)
    alone = [defense(probs[i : i + 1], images[i : i + 1]) for i in range(ROWS)]
    torch.testing.assert_close(torch.cat(alone), released, rtol=0, atol=1e-7)


def test_noise_depends_on_image_and_seed_alone():
    probs, images = torch.full((2000, 5), 0.2), randn(2000, 1, 2, 2).tanh()
    released = RandomNoise()(probs, images)
    j = released.argmax(1)
    # uniform over the four classes that are not the first, the top of a uniform row
    assert j.bincount(minlength=5)[0] == 0
    assert (j.bincount(minlength=5)[1:] - 500).abs().max() < 5 * (2000 * 3 / 16) ** 0.5
    assert (RandomNoise(seed=1)(probs, images).argmax(1) != j).float().mean() > 0.6
    levels = (images * 127.5).round() / 127.5 + 1 / 255  # on the grid of 8-bit images
    hardly = levels + 0.4 / 127.5 * randn(2000, 1, 2, 2, seed=1).sign()
    assert torch.equal(RandomNoise()(probs, levels), RandomNoise()(probs, hardly))
    one_pixel = levels.clone()
    one_pixel[:, 0, 0, 0] *= -1
    assert (RandomNoise()(probs, one_pixel) != RandomNoise()(probs, levels)).any(1).sum() > 1300


@every_defense
def test_victim_wears_it(cls):
    images = randn(7, 1, 2, 2).tanh()
    plain, defense = Victim(lambda x: 3 * x.flatten(1)), cls()
    victim = Victim(lambda x: 3 * x.flatten(1), defense=defense, query_budget=20, batch_size=3)
    answer = victim(images)
    assert is_simplex(answer) and victim.queries == 7
    torch.testing.assert_close(answer, defense(plain(images), images))
    assert torch.equal(victim(images), answer)
    assert cls.__name__ in victim.defense
    assert all(f"{name}={value}" in victim.defense for name, value in defense.to_dict().items())
    assert defense.fit(None) == defense  # nothing to learn


@pytest.mark.parametrize("cls", [LabelOnly, TopK, Stingy, Rounding])
def test_twins_show_what_the_victim_shows_scaled(cls):
    images = randn(50, 1, 2, 2)
    twin = {
        LabelOnly: {"answer": "label"},
        TopK: {"answer": "topk", "k": 3},
        Stingy: {"answer": "topk", "k": 2},
        Rounding: {"answer": "rounded", "decimals": 1},
    }[cls]
    shown = Victim(lambda x: x.flatten(1), **twin)(images)
    released = Victim(lambda x: x.flatten(1), defense=cls())(images)
    torch.testing.assert_close(released, shown / shown.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (RandomNoise, {"epsilon": 2.1}),
        (RandomNoise, {"epsilon": -0.1}),
        (RandomNoise, {"seed": -1}),
        (ReverseSigmoid, {"beta": -1}),
        (ClampedReverseSigmoid, {"gamma": 0}),
        (DCP, {"nu": 0}),
        (DCP, {"beta": float("nan")}),
        (Temperature, {"temperature": 0}),
        (TopK, {"k": 0}),
        (Stingy, {"k": 1.5}),
        (Rounding, {"decimals": -1}),
        (Rounding, {"decimals": 8}),
    ],
)
def test_wrong_settings_are_named(cls, bad):
    with pytest.raises(ConfigError, match=rf"^{next(iter(bad))}: wanted a (whole )?number"):
        cls(**bad)


def test_more_classes_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match="k: wanted at most the 2 classes, got 3"):
        TopK(k=3)(torch.full((1, 2), 0.5), torch.zeros(1, 1, 2, 2))
