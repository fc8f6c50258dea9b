from dataclasses import replace

import pytest
import torch
from testing import seeded
from torch import nn
from toys import (
    CLASSES,
    QUERIES,
    TEST_IMAGES,
    TEST_LABELS,
    Killed,
    kill_at,
    same_bits,
    toy_model,
    toy_victim,
)

from divqat.attacks import KnockoffNets
from divqat.attacks.jbda import JBDA, gradient_sign
from divqat.attacks.jbda_tr import JBDATR
from divqat.data import ImageSet, to_float
from divqat.metrics import accuracy, predict
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")
CLONE = toy_model(seed=1, dropout=0.3)
QUICK = {
    "jbda": JBDA(seeds=10, query_budget=33, epochs=2, batch_size=16),  # 10, 20, 33
    "tr": JBDATR(seeds=10, query_budget=55, epochs=2, batch_size=16),  # 10, 40, 55
}
both = pytest.mark.parametrize("attack", QUICK.values(), ids=QUICK)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


def linear(*rows):
    """A clone whose logits are ``rows`` times the pixels."""
    clone = nn.Sequential(nn.Flatten(), nn.Linear(len(rows[0]), len(rows), bias=False))
    clone[1].weight.data = torch.tensor(rows, dtype=torch.float32)
    return clone.eval()


# Two classes with logits ±w·x: the gradient of log p_0 is 2 p_1 w, that of log p_1 is -2 p_0 w.
TWO = linear([1, -2, 3, -4], [-1, 2, -3, 4])
PIXELS = torch.tensor([100, 100, 240, 20], dtype=torch.uint8).view(1, 1, 2, 2)


def test_ascent_is_the_sign_of_the_gradient():
    x = to_float(PIXELS).expand(2, -1, -1, -1)
    got = gradient_sign(TWO, x, torch.tensor([0, 1])).flatten(1)
    assert got.tolist() == [[1, -1, 1, -1], [-1, 1, -1, 1]]
    # Four classes with p = 1/4: the gradient of log p_0 is w_0 - (w_0 + w_1 + w_2 + w_3) / 4.
    clone = linear([1, 0, 0, 1], [5, 0, -1, 1], [0, 0, -3, 1], [0, 0, 0, 1])
    got = gradient_sign(clone, torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    assert got.flatten().tolist() == [-1, 0, 1, 0]


def test_new_images_move_by_epsilon_towards_the_label_and_are_clipped():
    answers = torch.tensor([[0.9, 0.1]])
    new = JBDA(epsilon=0.2)._augment(TWO, PIXELS, answers, 1, seeded())  # 51 levels
    assert new.flatten().tolist() == [151, 49, 255, 0]
    new = JBDA(epsilon=0.2)._augment(TWO, PIXELS, answers.flip(1), 1, seeded())
    assert new.flatten().tolist() == [49, 151, 189, 71]


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_targeted_images_move_to_the_other_class_and_not_beyond_epsilon(steps):
    attack = JBDATR(epsilon=0.2, steps=steps, targets=1)
    new = attack._augment(TWO, PIXELS, torch.tensor([[0.9, 0.1]]), 1, seeded())
    assert new.flatten().tolist() == [49, 151, 189, 71]


def test_targeted_images_take_small_steps():
    class Ridge(nn.Module):
        """Its second class is likeliest where the pixel is 0.1."""

        def forward(self, x):
            height = -(x.flatten(1) - 0.1).abs()
            return torch.cat([torch.zeros_like(height), height], 1)

    # Steps of 1.85 · 0.2 / T: with 8 of 0.04625 up, up, up, then down and up; with 3 of 0.1233 too.
    for steps, wanted in ((8, 2 * 0.04625), (3, 0.37 / 3), (2, 0.0), (1, 0.2)):
        attack = JBDATR(steps=steps)
        got = attack._perturb(Ridge(), torch.zeros(1, 1, 1, 1), torch.tensor([1]))
        assert got.item() == pytest.approx(wanted, abs=1e-6)


def test_targets_are_other_classes_each_as_often_and_no_two_alike():
    labels = torch.arange(CLASSES).repeat(500)
    goals = JBDATR()._goals(labels, CLASSES, seeded())
    assert goals.shape == (2000, 3)
    assert goals.sort(1).values.unique(dim=0).tolist() == [
        [0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]
    ]  # fmt: skip
    assert not (goals == labels[:, None]).any()
    first = torch.bincount(goals[labels == 0, 0], minlength=CLASSES)
    assert first[0] == 0 and first[1:].min() > 120  # 167 each
    assert (
        JBDATR(targets=2)._goals(torch.tensor([0, 1]), 2, seeded()) == torch.tensor([[1], [0]])
    ).all()


def test_literature_defaults_and_rounds():
    assert JBDA()._sizes() == [150, 300, 600, 1200, 2400, 4800, 9600]  # 150 · 2^6
    assert JBDATR()._sizes() == [1000, 4000, 16000, 50000]


@both
def test_counts_and_transfer_set(model, attack):
    victim = Victim(model)
    extraction = attack(victim, QUERIES, CLONE)
    images, answers = extraction.transfer_set
    assert extraction.queries == victim.queries == len(images) == attack.query_budget
    # asked in rounds: a batch of another size may differ in the last bits
    torch.testing.assert_close(answers, Victim(model)(to_float(images)))
    pool = {image.numpy().tobytes() for image in QUERIES}
    assert {image.numpy().tobytes() for image in images[:10]} <= pool
    assert len({image.numpy().tobytes() for image in images}) == len(images)
    # Each new image lies within ε (25.5 levels) of one that was asked about before.
    near = (images[:, None].int() - images.int()).abs().flatten(2).amax(2)
    assert (near[10:20, :10].amin(1) <= 26).all() and (near[20:].amin(1) <= 26).all()
    assert (near[10:20, :10].amin(1) > 0).all()
    assert not extraction.clone.training


@both
def test_it_may_start_from_images_of_its_own(model, attack):
    owned = ImageSet(TEST_IMAGES[:50], TEST_LABELS[:50])
    labels = ImageSet(owned.images, (owned.labels + 1) % CLASSES)  # which it does not learn
    attack = replace(attack, start="owned")
    assert attack.owns and not replace(attack, start="query_set").owns
    one, two = (attack.owning(mine)(Victim(model), QUERIES, CLONE) for mine in (owned, labels))
    assert torch.equal(one.transfer_set[1], two.transfer_set[1])
    there = {image.numpy().tobytes() for image in owned.images}
    mine = [image.numpy().tobytes() in there for image in one.transfer_set[0]]
    assert mine == [True] * 10 + [False] * (attack.query_budget - 10)


def test_new_images_are_better_than_none(model):
    alone, more = (
        attack(Victim(model), QUERIES, toy_model(seed=1)).clone
        for attack in (KnockoffNets(query_budget=20), JBDATR(seeds=20, query_budget=300))
    )
    alone, more = (accuracy(predict(clone, TEST_IMAGES), TEST_LABELS) for clone in (alone, more))
    assert more > alone + 0.1


def test_doubling_clone_is_better_than_chance(model):
    clone = JBDA(seeds=20, query_budget=160)(Victim(model), QUERIES, toy_model(seed=1)).clone
    assert accuracy(predict(clone, TEST_IMAGES), TEST_LABELS) > 0.5


@both
def test_same_seed_same_bits(model, attack):
    a, b = (attack(Victim(model), QUERIES, CLONE) for _ in range(2))
    assert same_bits(a.clone, b.clone) and torch.equal(a.transfer_set[0], b.transfer_set[0])
    other = replace(attack, seed=1)(Victim(model), QUERIES, CLONE)
    assert not torch.equal(other.transfer_set[0], a.transfer_set[0])


# Checkpoints: 0-2 the first weights of the rounds, then answers and two epochs per round.
@pytest.mark.parametrize(
    ("when", "asked"), [(0, 0), (1.5, 0), (3, 0), (3.5, 10), (6, 10), (7.5, 20), (11.5, 33)]
)
def test_killed_run_goes_on_bit_identically(model, tmp_path, monkeypatch, when, asked):
    attack = QUICK["jbda"]
    whole = attack(Victim(model), QUERIES, CLONE)
    with monkeypatch.context() as patch:
        kill_at(patch, when)
        with pytest.raises(Killed):
            attack(Victim(model), QUERIES, CLONE, resume_dir=tmp_path)
    second = Victim(model, query_budget=33 - asked)
    clone = CLONE if when < 3 else toy_model(seed=9, dropout=0.3)
    resumed = attack(second, QUERIES, clone, resume_dir=tmp_path)
    assert same_bits(whole.clone, resumed.clone)
    assert torch.equal(whole.transfer_set[0], resumed.transfer_set[0])
    assert (resumed.queries, second.remaining) == (33, 0)


@both
def test_too_small_a_budget_costs_no_query(model, attack):
    victim = Victim(model, query_budget=attack.query_budget - 1)
    with pytest.raises(QueryBudgetExceeded, match=f"needs {attack.query_budget} queries"):
        attack(victim, QUERIES, CLONE)
    assert victim.queries == 0


def test_watch_sees_every_epoch(model):
    seen = []
    QUICK["jbda"](Victim(model), QUERIES, CLONE, watch=lambda clone, _: seen.append(clone.training))
    assert seen == [False] * 6


def test_arguments_are_checked(model):
    with pytest.raises(ValueError, match="seeds: wanted 1 to 500, the images to draw them from"):
        JBDA(seeds=501)(Victim(model), QUERIES, CLONE)
    for bad in ({"seeds": 0}, {"epsilon": 0.0}, {"epsilon": 1.1}, {"steps": 0}, {"targets": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: wanted"):
            JBDATR(**bad)
    with pytest.raises(ValueError, match="seeds: wanted fewer than the query_budget of 100"):
        JBDA(seeds=100, query_budget=100)
    with pytest.raises(RuntimeError, match=r"JBDA needs labeled images"):
        JBDA(start="owned")(Victim(model), QUERIES, CLONE)
    few = ImageSet(TEST_IMAGES[:9], TEST_LABELS[:9])
    with pytest.raises(ValueError, match="seeds: wanted 1 to 9, the images to draw them from"):
        replace(QUICK["jbda"], start="owned").owning(few)(Victim(model), QUERIES, CLONE)
