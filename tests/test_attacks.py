import copy
from dataclasses import replace

import pytest
import torch
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

from divqat._util.files import load_checkpoint
from divqat.attacks import KnockoffNets, attack
from divqat.attacks.answers import distributions, reading
from divqat.data import to_float
from divqat.metrics import accuracy, chance, fidelity, predict
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")
CLONE = toy_model(seed=1, dropout=0.3)
QUICK = KnockoffNets(epochs=3, query_budget=100, batch_size=32, pad=1, flip=True)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"answer": "label"},
        {"answer": "topk", "k": 2},
        {"answer": "rounded", "decimals": 1},
    ],
)
def test_clone_is_far_better_than_chance(model, answer):
    victim = Victim(model, **answer)
    extraction = KnockoffNets(epochs=10, batch_size=32)(victim, QUERIES, toy_model(seed=1))
    logits = predict(extraction.clone, TEST_IMAGES)
    assert accuracy(predict(model, TEST_IMAGES), TEST_LABELS) > 0.9
    assert chance(TEST_LABELS) < 0.3
    assert accuracy(logits, TEST_LABELS) > 0.8
    assert fidelity(logits, predict(model, TEST_IMAGES)) > 0.8


def test_shuffled_answers_teach_nothing(model):
    shuffle = torch.Generator().manual_seed(0)

    def shuffled(images):
        with torch.no_grad():
            return model(images)[torch.randperm(len(images), generator=shuffle)]

    extraction = KnockoffNets(epochs=5)(Victim(shuffled), QUERIES, toy_model(seed=1))
    assert abs(accuracy(predict(extraction.clone, TEST_IMAGES), TEST_LABELS) - 0.25) < 0.15


def test_counts_and_transfer_set(model):
    victim = Victim(model)
    extraction = QUICK(victim, QUERIES, CLONE)
    images, answers = extraction.transfer_set
    assert extraction.queries == victim.queries == len(images) == len(answers) == 100
    assert torch.equal(answers, Victim(model)(to_float(images)))
    rows = {image.numpy().tobytes() for image in images}
    assert len(rows) == 100  # without replacement
    assert rows <= {image.numpy().tobytes() for image in QUERIES}
    assert not torch.equal(images, QUERIES[:100])


def test_no_budget_asks_everything_once(model):
    victim = Victim(model)
    assert KnockoffNets(epochs=1)(victim, QUERIES[:90], CLONE).queries == victim.queries == 90


def test_hard_and_soft_answers_are_asked_about_the_same_images(model):
    soft = QUICK(Victim(model), QUERIES, CLONE).transfer_set
    hard = QUICK(Victim(model, answer="label"), QUERIES, CLONE).transfer_set
    assert torch.equal(soft[0], hard[0])
    assert torch.equal(soft[1].argmax(1), hard[1].argmax(1))


def test_same_seed_same_bits(model):
    before = torch.get_rng_state()
    a, b = (QUICK(Victim(model), QUERIES, CLONE) for _ in range(2))
    assert same_bits(a.clone, b.clone)
    assert torch.equal(torch.get_rng_state(), before)
    other = KnockoffNets(epochs=3, query_budget=100, batch_size=32, pad=1, flip=True, seed=1)
    assert not torch.equal(other(Victim(model), QUERIES, CLONE).transfer_set[0], a.transfer_set[0])


def test_given_clone_stays_as_it_was_and_result_is_in_eval_mode(model):
    clone = copy.deepcopy(CLONE)
    extraction = QUICK(Victim(model), QUERIES, clone)
    assert same_bits(clone, CLONE) and clone.training
    assert not any(module.training for module in extraction.clone.modules())


@pytest.mark.parametrize("when", [0, 0.5, 1, 1.5, 2, 2.5, 4, 4.5, 5, 6.5])
def test_killed_run_goes_on_bit_identically(model, tmp_path, monkeypatch, when):
    # The checkpoints: 0 the first weights, 1-3 answers (40 + 40 + 20), 4-6 the epochs.
    monkeypatch.setattr(attack, "QUERIES_PER_SAVE", 40)
    whole = QUICK(Victim(model, query_budget=100), QUERIES, CLONE)
    with monkeypatch.context() as patch:
        kill_at(patch, when)
        first = Victim(model, query_budget=100)
        with pytest.raises(Killed):
            QUICK(first, QUERIES, CLONE, resume_dir=tmp_path)
    second = Victim(model, query_budget=100)
    # After the first checkpoint the initial weights of the second run no longer matter.
    clone = CLONE if when == 0 else toy_model(seed=9, dropout=0.3)
    resumed = QUICK(second, QUERIES, clone, resume_dir=tmp_path)
    assert same_bits(whole.clone, resumed.clone)
    for a, b in zip(whole.transfer_set, resumed.transfer_set, strict=True):
        assert torch.equal(a, b)
    assert resumed.queries == 100
    stored = 40 * min(2, max(0, int(when + 0.5) - 1)) if when < 3.5 else 100
    assert second.queries == 100 - stored


def test_run_killed_inside_an_epoch_goes_on_bit_identically(model, tmp_path, monkeypatch):
    whole = QUICK(Victim(model), QUERIES, CLONE)
    step, count = torch.optim.SGD.step, [0]

    def step_or_die(*args, **kwargs):
        count[0] += 1
        if count[0] == 6:  # four steps an epoch: the second step of the second
            raise Killed
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step_or_die)
        with pytest.raises(Killed):
            QUICK(Victim(model), QUERIES, CLONE, resume_dir=tmp_path)
    assert load_checkpoint(tmp_path / "clone.pt")["epoch"] == 1
    assert same_bits(QUICK(Victim(model), QUERIES, CLONE, resume_dir=tmp_path).clone, whole.clone)


def test_finished_run_asks_and_trains_nothing(model, tmp_path):
    done = QUICK(Victim(model), QUERIES, CLONE, resume_dir=tmp_path)
    victim = Victim(model, query_budget=0)
    again = QUICK(victim, QUERIES, CLONE, resume_dir=tmp_path)
    assert same_bits(done.clone, again.clone)
    assert (victim.queries, again.queries) == (0, 100)


def test_folder_of_other_settings_is_refused(model, tmp_path):
    QUICK(Victim(model), QUERIES, CLONE, resume_dir=tmp_path)
    other = KnockoffNets(epochs=3, query_budget=100, batch_size=32, pad=1, flip=True, lr=0.1)
    with pytest.raises(ValueError, match=r"other settings: lr is 0\.02 there, 0\.1 here"):
        other(Victim(model), QUERIES, CLONE, resume_dir=tmp_path)
    with pytest.raises(ValueError, match="answer is probs there, label here"):
        QUICK(Victim(model, answer="label"), QUERIES, CLONE, resume_dir=tmp_path)
    with pytest.raises(ValueError, match="query_set is"):
        QUICK(Victim(model), QUERIES.flip(0), CLONE, resume_dir=tmp_path)
    with pytest.raises(ValueError, match="clone is"):
        QUICK(Victim(model), QUERIES, toy_model(dropout=0.1), resume_dir=tmp_path)


def test_too_small_a_budget_costs_no_query(model):
    victim = Victim(model, query_budget=99)
    with pytest.raises(QueryBudgetExceeded, match="needs 100 queries, the victim allows 99"):
        QUICK(victim, QUERIES, CLONE)
    assert victim.queries == 0


def test_clone_that_does_not_fit_costs_no_query(model):
    victim = Victim(model)
    with pytest.raises(RuntimeError):
        QUICK(victim, QUERIES[:, :, :5], CLONE)
    assert victim.queries == 0
    with pytest.raises(ValueError, match="wanted 4 classes like the victim, got 3"):
        QUICK(victim, QUERIES, toy_model(classes=3))


def test_single_last_image_does_not_break_batch_norm(model):
    clone = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    KnockoffNets(epochs=1, query_budget=33, batch_size=32)(Victim(model), QUERIES, clone)


def test_targets_are_rows_of_sum_one():
    answers = torch.tensor([[0.5, 0.0, 0.0, 0.3], [0, 0, 0, 0], [0, 1, 0, 0]])
    wanted = torch.tensor([[0.625, 0, 0, 0.375], [0.25] * 4, [0, 1, 0, 0]])
    torch.testing.assert_close(distributions(answers), wanted)


def test_learning_rate_falls_along_a_cosine(model, monkeypatch):
    seen, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    KnockoffNets(epochs=2, query_budget=64, batch_size=32, lr=1.0)(Victim(model), QUERIES, CLONE)
    assert seen == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_diverging_clone_is_an_error(model, tmp_path):
    extreme = KnockoffNets(epochs=2, query_budget=100, lr=1e30)
    with pytest.raises(FloatingPointError, match=r"loss is nan .* lower lr"):
        extreme(Victim(model), QUERIES, CLONE, resume_dir=tmp_path)


@pytest.mark.parametrize(
    "argument",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"query_budget": 0},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"pad": -1},
    ],
)
def test_arguments_are_checked(argument):
    with pytest.raises(ValueError, match=f"{next(iter(argument))}: wanted"):
        KnockoffNets(**argument)


def test_inputs_are_checked(model):
    with pytest.raises(TypeError, match=r"wanted a divqat\.Victim, got Sequential"):
        QUICK(model, QUERIES, CLONE)
    with pytest.raises(ValueError, match="query_set: wanted uint8"):
        QUICK(Victim(model), to_float(QUERIES), CLONE)
    with pytest.raises(ValueError, match="wanted 1 to 50, the size of the query set, got 100"):
        QUICK(Victim(model), QUERIES[:50], CLONE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clone_trains_on_its_device(model, tmp_path):
    before = torch.cuda.get_rng_state()
    clone = copy.deepcopy(CLONE).cuda()
    extraction = QUICK(Victim(model), QUERIES, clone, resume_dir=tmp_path)
    assert next(extraction.clone.parameters()).is_cuda
    assert extraction.transfer_set[1].device.type == "cpu"
    assert torch.equal(torch.cuda.get_rng_state(), before)
    again = QUICK(Victim(model), QUERIES, clone, resume_dir=tmp_path)
    assert same_bits(again.clone, extraction.clone)


ANSWERS = torch.tensor([[0.64, 0.04, 0.16, 0.16], [0.1, 0.7, 0.2, 0.0]])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("as_given", [[0.64, 0.04, 0.16, 0.16], [0.1, 0.7, 0.2, 0.0]]),
        ("label", [[1, 0, 0, 0], [0, 1, 0, 0]]),
        ("temperature2", [[8 / 18, 2 / 18, 4 / 18, 4 / 18], None]),
        # of two answers the larger is one standard deviation above the mean, in each class
        (
            "standardized1",
            [[0.440399, 0.059601, 0.059601, 0.440399], [0.059601, 0.440399, 0.440399, 0.059601]],
        ),
        ("top2", [[0.8, 0, 0.2, 0], [0, 7 / 9, 2 / 9, 0]]),
        ("rounded1", [[0.6, 0, 0.2, 0.2], [0.1, 0.7, 0.2, 0.0]]),
        ("rounded0", [[1, 0, 0, 0], [0, 1, 0, 0]]),
    ],
)
def test_readings(text, wanted):
    got = reading(text)(ANSWERS)
    torch.testing.assert_close(got.sum(1), torch.ones(2))
    for row, values in zip(got, wanted, strict=True):
        if values is not None:
            torch.testing.assert_close(row, torch.tensor(values, dtype=torch.float32))


def test_a_small_temperature_leaves_the_likeliest_class():
    probs = torch.full((1, 100), 0.79 / 99)
    probs[0, 7] = 0.21
    got = reading("temperature0.01")(probs)
    torch.testing.assert_close(got, torch.eye(100)[7:8])


@pytest.mark.parametrize(
    "text", ["labels", "top", "top0", "top1.5", "temperature0", "standardized0", "rounded0.5"]
)
def test_unknown_reading(text):
    with pytest.raises(ValueError, match="reading: wanted"):
        KnockoffNets(reading=text)


def test_reading_the_label_is_being_shown_the_label(model):
    shown = QUICK(Victim(model, answer="label"), QUERIES, CLONE)
    read = replace(QUICK, reading="label")(Victim(model), QUERIES, CLONE)
    assert same_bits(shown.clone, read.clone)


def test_watch_sees_every_epoch(model):
    seen = []
    extraction = QUICK(
        Victim(model), QUERIES, CLONE, watch=lambda clone, _: seen.append(copy.deepcopy(clone))
    )
    assert len(seen) == QUICK.epochs and not seen[0].training
    assert same_bits(seen[-1], extraction.clone) and not same_bits(seen[0], seen[-1])


def test_bfloat16_clone_is_as_good(model):
    clone = KnockoffNets(precision="bfloat16", batch_size=32)(Victim(model), QUERIES, CLONE).clone
    assert next(clone.parameters()).dtype == torch.float32
    assert accuracy(predict(clone, TEST_IMAGES), TEST_LABELS) > 0.8
