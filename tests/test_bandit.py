"""The adaptive strategy: the bandit, its rewards and the groups it chooses from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import QUERIES, Killed, kill_at, toy_model, toy_victim

from divqat.attacks.bandit import GradientBandit, advantages, certainty, diversity
from divqat.attacks.knockoff_adaptive import KnockoffAdaptive, k_means, thumbnails
from divqat.data import to_float
from divqat.victim import Victim


def test_preferences_by_hand():
    bandit = GradientBandit(torch.tensor([0, 1, 2, 2]))
    policy = bandit.policy()
    assert policy.tolist() == pytest.approx([1 / 3] * 3)
    bandit.learn(2, policy, 0.6)
    # H(2) = 0.6 (1 - 1/3), the others -0.6 / 3
    assert bandit.preferences.tolist() == pytest.approx([-0.2, -0.2, 0.4])
    total = 2 * math.exp(-0.2) + math.exp(0.4)
    policy = bandit.policy()
    assert policy.tolist() == pytest.approx(
        [math.exp(-0.2) / total, math.exp(-0.2) / total, math.exp(0.4) / total]
    )
    # The second image of group 2 counts half: N(2) = 2.
    bandit.learn(2, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), -0.8)
    assert bandit.preferences.tolist() == pytest.approx([-0.2 + 0.2, -0.2 + 0.1, 0.4 - 0.3])
    # The first of group 0 counts in full.
    bandit.learn(0, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), 1.0)
    assert bandit.preferences.tolist() == pytest.approx([0.5, -0.35, -0.15])


def test_drawing_is_without_replacement_and_leaves_empty_groups_out():
    torch.manual_seed(0)
    groups = torch.tensor([0, 2, 0, 2, 2])  # no image is in group 1
    bandit = GradientBandit(groups)
    rows, drawn, policies = bandit.draw(5)
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert groups[rows].tolist() == drawn
    for number, policy in enumerate(policies):
        left = set(groups[[row for row in range(5) if row not in rows[:number]]].tolist())
        assert {group for group in range(3) if policy[group] > 0} == left
        assert float(policy.sum()) == pytest.approx(1)


def test_a_rewarded_group_is_drawn_more_often():
    torch.manual_seed(0)
    bandit = GradientBandit(torch.arange(4000) % 4)
    for _ in range(300):
        _, groups, policies = bandit.draw(1)
        bandit.learn(groups[0], policies[0], 1.0 if groups[0] == 3 else -0.5)
    drawn = torch.tensor(bandit.draw(400)[1]).bincount(minlength=4)
    assert drawn.argmax() == 3 and drawn[3] > 200


def test_certainty_by_hand():
    answers = torch.tensor([[0.7, 0.1, 0.2], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(certainty(answers), torch.tensor([0.5, 0.25, 1.0, 0.0]))


def test_diversity_by_hand():
    answers = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.2, 0.8], [0.2, 0.8]])
    # means: uniform; [1, 0]; [.8, .2]; of the two before [.4, .6]
    torch.testing.assert_close(diversity(answers, 0, 2), torch.tensor([0.5, 0.4, 0.6, 0.2]))
    torch.testing.assert_close(diversity(answers, 2, 2), torch.tensor([0.6, 0.2]))


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 5.0], [4.0, 5.0], [1.0, 9.0], [2.0, 7.0]])
    # The window of image 3: images 1 and 2 with [1, 0] and [0, 1] after scaling, itself [1/3, 1/2].
    wanted = [0, 1, (0.25 + 1) - (0 + 1) / 2, (1 / 3 + 1 / 2) - 1]
    assert advantages(rewards, 0, 2) == pytest.approx(wanted)
    assert advantages(rewards, 3, 2) == pytest.approx(wanted[3:])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=16), min_size=2, max_size=8),
    st.floats(0.1, 10),
    st.floats(-10, 10),
)
def test_unit_and_zero_of_a_reward_do_not_matter(values, scale, shift):
    values = torch.tensor(values, dtype=torch.float64)
    other = torch.arange(float(len(values)), dtype=torch.float64)
    plain = advantages(torch.stack([values, other], 1), 0, 3)
    changed = advantages(torch.stack([values * scale + shift, other], 1), 0, 3)
    assert all(abs(x) <= 2 for x in plain)  # two kinds in [0, 1]
    varied = [len(set(values[max(0, t - 3) : t + 1].tolist())) > 1 for t in range(len(values))]
    for a, b, counts in zip(plain, changed, varied, strict=True):
        if counts:  # equal values may differ after rounding
            assert a == pytest.approx(b, abs=1e-2)


def test_clusters_are_those_of_well_separated_points():
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0], [50, 0], [0, 50]])
    truth = torch.arange(90) % 3
    group = k_means(centers[truth] + torch.randn(90, 2), 3)
    assert group.dtype == torch.int64 and int(group.max()) < 3
    # No cluster has points of two blobs; from a bad start k-means may cut a blob in two.
    shared = [len(set(truth[group == g].tolist())) for g in range(3) if (group == g).any()]
    assert shared.count(1) >= 1 and max(shared) <= 2


def test_points_end_with_their_nearest_mean():
    torch.manual_seed(1)
    points = torch.randn(200, 3)
    group = k_means(points, 5)
    means = torch.stack([points[group == g].mean(0) for g in range(5)])
    nearest = torch.stack([(points - mean).norm(dim=1) for mean in means], 1).argmin(1)
    assert float((nearest == group).float().mean()) > 0.97


def test_thumbnails_are_grey_means():
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    wanted = to_float(images).mean(1).view(2, 8, 2, 8, 2).mean((2, 4)).flatten(1)
    torch.testing.assert_close(thumbnails(images), wanted)


def test_policy_prefers_what_teaches():
    """Half of the images get one and the same answer, which never tells anything new."""
    model = toy_victim()
    dull = torch.zeros_like(QUERIES[:250])
    dull += torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1) % 4
    query_set = torch.cat([QUERIES[:250], dull])
    settings = KnockoffAdaptive(
        epochs=1, query_budget=200, groups=6, round_size=10, rewards=("diversity",)
    )
    extraction = settings(Victim(model), query_set, toy_model(seed=1))
    shown = float((extraction.transfer_set[0].amax((1, 2, 3)) > 3).float().mean())
    assert shown > 0.6


@pytest.mark.parametrize("kind", ["certainty", "diversity", "loss"])
def test_each_reward_works_alone_and_matters(kind):
    settings = {"epochs": 1, "query_budget": 120, "groups": 6, "round_size": 20}
    victim = Victim(toy_victim())
    all_three = KnockoffAdaptive(**settings)(victim, QUERIES, toy_model(seed=1))
    alone = KnockoffAdaptive(**settings, rewards=(kind,))(victim, QUERIES, toy_model(seed=1))
    assert not torch.equal(all_three.transfer_set[0], alone.transfer_set[0])


def test_a_killed_run_that_would_now_choose_others_says_so(tmp_path, monkeypatch):
    """As with another number of threads, which changes the last bits of rewards."""
    attack = KnockoffAdaptive(epochs=1, query_budget=60, groups=6, round_size=20)
    with monkeypatch.context() as patch:
        kill_at(patch, 1.5)  # two of three rounds
        with pytest.raises(Killed):
            attack(Victim(toy_victim()), QUERIES, toy_model(seed=1), resume_dir=tmp_path)
    victim = Victim(toy_victim())
    monkeypatch.setattr(
        "divqat.attacks.knockoff_adaptive.k_means", lambda points, count: QUERIES[:, 0, 0, 0] % 6
    )
    with pytest.raises(ValueError, match=r"round0.pt has answers to other images; .* threads"):
        attack(victim, QUERIES, toy_model(seed=1), resume_dir=tmp_path)
    assert victim.queries == 0


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="rewards: wanted one of certainty, diversity, loss, got"):
        KnockoffAdaptive(rewards=("certain",))
    with pytest.raises(ValueError, match="rewards: wanted a list of at least one value"):
        KnockoffAdaptive(rewards=())
    victim = Victim(toy_victim())
    with pytest.raises(ValueError, match=r"groups: wanted at most the 20 images .* got 32"):
        KnockoffAdaptive()(victim, QUERIES[:20], toy_model())
    assert victim.queries == 0
