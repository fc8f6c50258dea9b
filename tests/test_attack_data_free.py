import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from testing import seeded
from torch import nn
from toys import (
    QUERIES,
    TEST_IMAGES,
    TEST_LABELS,
    Killed,
    kill_at,
    same_bits,
    toy_model,
    toy_victim,
)

from divqat.attacks import data_free
from divqat.attacks.dfme import DFME
from divqat.attacks.folder import Folder
from divqat.attacks.generator import Generator
from divqat.attacks.maze import MAZE
from divqat.attacks.memory import Memory
from divqat.attacks.zeroth_order import zeroth_order
from divqat.data import to_float
from divqat.data.batches import to_uint8
from divqat.metrics import accuracy, predict
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")
CLONE = toy_model(seed=1, dropout=0.3)
# A round costs 4 · (1 + 1 + 5) and 4 · (2 + 1 + 5 - 1) queries, 28 both.
QUICK = {
    "dfme": DFME(query_budget=28 * 5 + 27, batch_size=4, latent=8),
    "maze": MAZE(query_budget=28 * 5 + 27, batch_size=4, latent=8, directions=2, replay_steps=3),
}
both = pytest.mark.parametrize("attack", QUICK.values(), ids=QUICK)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


@pytest.fixture(scope="module")
def whole(model):
    """An uninterrupted run of each attack."""
    return {name: attack(Victim(model), QUERIES, CLONE) for name, attack in QUICK.items()}


def test_zeroth_order_of_one_pixel():
    # u is 1 or -1, and ((x + εu)² - x²) / ε · u = 2x + εu
    x = torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1, 1)
    torch.manual_seed(0)
    got = zeroth_order(lambda x: x.flatten() ** 2, x, x.flatten() ** 2, 1, 0.25).flatten()
    assert ((got - torch.tensor([-2.0, 0.0, 4.0])).abs() == 0.25).all()


def test_zeroth_order_converges_to_the_gradient():
    weights = torch.randn(2, 3, 2, generator=seeded(1), dtype=torch.float64)
    x = torch.randn(3, 2, 3, 2, generator=seeded(2), dtype=torch.float64, requires_grad=True)

    def d(x):
        calls.append(len(x))
        return (weights * x).sin().flatten(1).sum(1)

    calls = []
    (wanted,) = torch.autograd.grad(d(x).sum(), x)
    torch.manual_seed(0)
    calls.clear()
    got = zeroth_order(d, x.detach(), d(x).detach(), 4000, 1e-5)
    assert calls == [3] * 4001
    # An entry's variance is below (D |g|² + 2 D g²) / m.
    bound = 5 * (12 * wanted.flatten(1).square().sum(1) * 3 / 4000).sqrt()
    assert ((got - wanted).abs() < bound[:, None, None, None]).all()
    assert (torch.nn.functional.cosine_similarity(got.flatten(1), wanted.flatten(1)) > 0.98).all()


def test_victim_of_8_bit_inputs_hides_its_gradient_from_small_steps_only(model):
    raw = torch.randn(16, 1, 8, 8, generator=seeded(), requires_grad=True)
    (wanted,) = torch.autograd.grad(model(raw.tanh())[:, 0].sum(), raw)

    def cosine(smoothing):
        def d(raw):
            return model(to_float(to_uint8(raw.tanh())))[:, 0].detach()

        got = zeroth_order(d, raw.detach(), d(raw), 100, smoothing)
        return nn.functional.cosine_similarity(got.flatten(1), wanted.flatten(1)).mean()

    torch.manual_seed(0)
    assert cosine(1e-3) < 0.4
    assert cosine(0.1) > 0.65


@pytest.mark.slow
@pytest.mark.parametrize(("smoothing", "warned"), [(1e-3, True), (0.1, False)])
def test_it_warns_of_steps_that_a_victim_does_not_see(model, smoothing, warned):
    attack = replace(QUICK["dfme"], smoothing=smoothing, query_budget=1_000)
    assert attack.query_budget >= attack.queries_per_round
    victim = Victim(lambda images: model(to_float(to_uint8(images))))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attack(victim, QUERIES, toy_model(seed=1))
    found = [str(one.message) for one in said if "smoothing: a step of" in str(one.message)]
    assert len(found) == warned and all("use about 0.063" in text for text in found)


def test_dfme_compares_centred_log_probabilities():
    # log y = log(1, 2, 4) - log 7, so v = (-log 2, 0, log 2) and s = (0, 1, 0)
    answers, logits = torch.tensor([[1 / 7, 2 / 7, 4 / 7]]), torch.tensor([[0.0, 1, 0]])
    assert DFME().distance(answers, logits).item() == pytest.approx((2 * math.log(2) + 1) / 3)
    # One-hot with e^-2 for 0: v = (1, -1)
    got = DFME(floor=math.exp(-2)).distance(torch.tensor([[1.0, 0]]), torch.zeros(1, 2))
    assert got.item() == pytest.approx(1)
    # The victim's own centred logits are at no distance.
    own = torch.randn(5, 4, generator=seeded())
    own -= own.mean(1, keepdim=True)
    assert DFME().distance(own.softmax(1), own).max() < 1e-6


def test_maze_compares_by_kl():
    # softmax(s) = (1/4, 3/4)
    answers, logits = torch.tensor([[0.5, 0.5], [1, 0]]), torch.tensor([[0.0, math.log(3)]] * 2)
    wanted = torch.tensor([0.5 * math.log(4 / 3), math.log(4)])
    torch.testing.assert_close(MAZE().distance(answers, logits), wanted)


def test_schedules():
    decay = [DFME().decay(done) for done in (0, 0.09, 0.1, 0.29, 0.3, 0.5, 0.99)]
    assert decay == pytest.approx([1, 1, 0.3, 0.3, 0.09, 0.027, 0.027])
    assert [MAZE().decay(d) for d in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])


def test_literature_costs():
    assert DFME().queries_per_round == 256 * 7
    assert MAZE().queries_per_round == 128 * 15


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 7, 9), (1, 1, 2)])
def test_generator_makes_images_of_any_size(shape):
    torch.manual_seed(0)
    images = Generator(16, shape, learn_range=False)(torch.randn(64, 16))
    assert images.shape == (64, *shape)
    channels = images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(shape[0]), atol=1e-1, rtol=0)


@pytest.mark.parametrize(
    ("attack", "learns"), [(DFME(), False), (MAZE(), True), (MAZE(learn_range=False), False)]
)
def test_only_mazes_generator_learns_brightness(attack, learns):
    torch.manual_seed(0)
    generator = Generator(16, (1, 8, 8), learn_range=attack.learns_range)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        generator(torch.randn(8, 16)).mean().backward()  # darker
        optimizer.step()
    # By 0.1 in each step, or never: without weights a batch has mean 0.
    wanted = -2 if learns else 0
    assert generator(torch.randn(8, 16)).mean().item() == pytest.approx(wanted, abs=1e-4)


def test_memory_gives_back_what_it_got(tmp_path):
    folder = Folder(tmp_path, {})
    rounds = [(torch.rand(4, 1, 2, 2) * 2 - 1, torch.rand(4, 3)) for _ in range(3)]
    memory = Memory(5, 4, (1, 2, 2), 3)
    for batch in rounds[:2]:
        memory.add(*batch)
    memory.save(folder)
    memory.add(*rounds[2])
    memory.save(folder)
    read = Memory(5, 4, (1, 2, 2), 3)
    read.load(folder, 3)
    images, answers = read.draw(400)
    row = (answers[:, None] == torch.cat([a for _, a in rounds])).all(2).int().argmax(1)
    assert (images - torch.cat([i for i, _ in rounds])[row]).abs().max() <= 1 / 255 + 1e-6
    assert row.unique().tolist() == list(range(12))


@both
def test_counts(model, attack):
    sizes, seen = [], []

    def spy(images):
        sizes.append(len(images))
        seen.append(images)
        return model(images)

    victim = Victim(spy)
    extraction = attack(victim, QUERIES, CLONE)
    # Five whole rounds; what is left of the budget is no round.
    assert extraction.queries == victim.queries == sum(sizes) == 5 * 28
    assert attack.queries_per_round == 28 and set(sizes) == {4}
    images, answers = extraction.transfer_set
    assert images.dtype == torch.uint8 and images.shape == (20, 1, 8, 8)
    assert answers.shape == (20, 4)
    asked = torch.cat(seen[-28 // 4 :])
    assert asked.min() >= -1 and asked.max() <= 1
    # What the clone learned in the last round was asked in it, the images to within rounding.
    rows = [(asked - image).flatten(1).abs().amax(1).argmin() for image in to_float(images)]
    assert (asked[torch.stack(rows)] - to_float(images)).abs().max() <= 1 / 255 + 1e-6
    wanted = model(asked[torch.stack(rows)]).softmax(1)
    # Not exact: the image that is nearest may be one that probes a direction around the other.
    torch.testing.assert_close(answers, wanted, atol=5e-3, rtol=0)
    assert extraction.queries == attack(Victim(model), QUERIES, CLONE).queries


@both
def test_only_the_shape_of_the_query_set_matters(model, attack):
    a, b = (attack(Victim(model), images, CLONE) for images in (QUERIES, TEST_IMAGES[:1]))
    assert same_bits(a.clone, b.clone)
    other = replace(attack, seed=1)(Victim(model), QUERIES, CLONE)
    assert not torch.equal(a.transfer_set[0], other.transfer_set[0])


@pytest.mark.parametrize(
    "attack",
    [
        DFME(query_budget=1500, batch_size=16, latent=32),
        MAZE(query_budget=1500, batch_size=16, latent=32, directions=1, replay_steps=2),
    ],
    ids=["dfme", "maze"],
)
def test_clone_is_far_better_than_chance(model, attack):
    clone = attack(Victim(model), QUERIES, toy_model(seed=1)).clone
    assert accuracy(predict(clone, TEST_IMAGES), TEST_LABELS) > 0.5


@pytest.mark.parametrize(("attack", "lr"), [(DFME, 0.01), (MAZE, 10.0)])
def test_generator_finds_images_on_which_they_differ(attack, lr):
    def linear(seed):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()

    def distance(rounds):
        images, answers = attack(
            query_budget=rounds * 16 * 9,
            batch_size=16,
            directions=7,
            clone_steps=1 + attack.reuses_images,
            replay_steps=0,
            latent=16,
            generator_lr=lr,
            lr=1e-9,  # the clone stays what it was
        )(Victim(linear(0)), QUERIES, linear(1)).transfer_set
        return attack().distance(answers, predict(linear(1), images)).mean()

    assert distance(25) > 1.25 * distance(1)


# Rounds 2, 4 and 5 are stored. Checkpoints of MAZE: the memory, then the rest.
@pytest.mark.parametrize(
    ("name", "when", "stored"),
    [
        *[("dfme", 0, 0), ("dfme", 0.5, 0), ("dfme", 1.5, 2), ("dfme", 3, 4), ("dfme", 3.5, 5)],
        *[("maze", 1, 0), ("maze", 2.5, 0), ("maze", 3.5, 2), ("maze", 6.5, 4), ("maze", 7.5, 5)],
    ],
)
def test_killed_run_goes_on_bit_identically(
    model, whole, tmp_path, monkeypatch, name, when, stored
):
    monkeypatch.setattr(data_free, "ROUNDS_PER_SAVE", 2)
    attack, wanted = QUICK[name], whole[name]
    with monkeypatch.context() as patch:
        kill_at(patch, when)
        with pytest.raises(Killed):
            attack(Victim(model), QUERIES, CLONE, resume_dir=tmp_path)
    second = Victim(model, query_budget=(5 - stored) * 28)
    clone = CLONE if when in (0, 1) else toy_model(seed=9, dropout=0.3)
    resumed = attack(second, QUERIES, clone, resume_dir=tmp_path)
    assert same_bits(wanted.clone, resumed.clone)
    for a, b in zip(wanted.transfer_set, resumed.transfer_set, strict=True):
        assert torch.equal(a, b)
    assert (resumed.queries, second.remaining) == (5 * 28, 0)


@both
def test_watch_sees_the_clone_whenever_it_is_stored(model, monkeypatch, attack):
    monkeypatch.setattr(data_free, "ROUNDS_PER_SAVE", 2)
    seen = []
    extraction = attack(
        Victim(model), QUERIES, CLONE, watch=lambda clone, _: seen.append(copy.deepcopy(clone))
    )
    assert len(seen) == 3 and not any(clone.training for clone in seen)
    assert same_bits(seen[-1], extraction.clone) and not same_bits(seen[0], seen[1])
    assert same_bits(attack(Victim(model), QUERIES, CLONE).clone, extraction.clone)


@both
def test_too_small_a_budget_costs_no_query(model, attack):
    victim = Victim(model, query_budget=5 * 28 - 1)
    with pytest.raises(QueryBudgetExceeded, match="needs 140 queries, the victim allows 139"):
        attack(victim, QUERIES, CLONE)
    assert victim.queries == 0


def test_errors(model):
    with pytest.raises(ValueError, match=r"query_budget: wanted at least 1920, .* got 1919"):
        MAZE(query_budget=1919)
    with pytest.raises(ValueError, match="wanted 4 classes like the victim, got 3"):
        QUICK["dfme"](Victim(model), QUERIES, toy_model(classes=3))
    for attack in QUICK.values():
        with pytest.raises(FloatingPointError, match=r"no longer finite in round .* lower lr"):
            replace(attack, lr=1e30)(Victim(model), QUERIES, CLONE)


def test_bfloat16_clone_learns(model):
    attack = replace(QUICK["maze"], precision="bfloat16")
    assert not same_bits(attack(Victim(model), QUERIES, CLONE).clone, CLONE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both
def test_networks_train_on_the_device_of_the_clone(model, tmp_path, attack):
    clone = copy.deepcopy(CLONE).cuda()
    extraction = attack(Victim(model), QUERIES, clone, resume_dir=tmp_path)
    assert next(extraction.clone.parameters()).is_cuda
    assert {part.device.type for part in extraction.transfer_set} == {"cpu"}
    again = attack(Victim(model, query_budget=0), QUERIES, clone, resume_dir=tmp_path)
    assert same_bits(again.clone, extraction.clone)
