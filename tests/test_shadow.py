"""Shadow victims: what they learn, and what is learned from them."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from toys import QUERIES, Killed, kill_at, same_bits, toy_images, toy_model, toy_victim

from divqat._util.settings import ConfigError
from divqat.attacks import KnockoffNets, Shadow, attack, shadow
from divqat.attacks.answers import reading
from divqat.attacks.ddae import train
from divqat.attacks.training import Training
from divqat.data import ImageSet, to_float
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")

CLONE = toy_model(seed=1, dropout=0.3)
OWNED = ImageSet(*toy_images(60, seed=6))
QUICK = Shadow(
    query_budget=100, epochs=2, batch_size=32, shadows=2, shadow_epochs=2, shadow_batch_size=20,
    shadow_pad=1, proxy_share=0.5, recovery_epochs=2,
)  # fmt: skip
MODEL = toy_victim()


@cache
def whole(seed):
    """The clone of an uninterrupted run."""
    return replace(QUICK, seed=seed).owning(OWNED)(Victim(MODEL), QUERIES, CLONE).clone


# what the shadows learn


def spied(monkeypatch):
    """Every training: how many images, the loss, and copies of the network before and after."""
    seen, run = [], Training.run

    def spy(self, images, targets, loss):
        before = copy.deepcopy(self.task.clone)
        after = run(self, images, targets, loss)
        seen.append((self, images, loss, before, copy.deepcopy(after)))
        return after

    monkeypatch.setattr(Training, "run", spy)
    return seen


def test_shadows_learn_the_labels_then_the_defense(monkeypatch):
    seen = spied(monkeypatch)
    QUICK.owning(OWNED)(Victim(MODEL), QUERIES, CLONE)
    assert [len(images) for _, images, *_ in seen] == [60, 60, 60, 60, 100]
    names = [training.name for training, *_ in seen]
    assert names == [
        "shadow0.pt", "shadow0-defended.pt", "shadow1.pt", "shadow1-defended.pt", "clone.pt",
    ]  # fmt: skip
    settings = [training.attack for training, *_ in seen[:4]]
    assert {(a.epochs, a.lr, a.batch_size, a.pad) for a in settings} == {(2, 0.05, 20, 1)}
    losses = [loss is shadow.learn_labels.__defaults__[1] for _, _, loss, *_ in seen]
    assert losses == [True, False, True, False, True]
    first, on, other, _, clone = ((before, after) for _, _, _, before, after in seen)
    assert same_bits(first[1], on[0])  # it goes on
    assert not same_bits(first[0], other[0]) and not same_bits(first[0], CLONE)
    assert same_bits(clone[0], CLONE)


# what the clone learns


def test_a_victim_of_labels_is_imitated_in_labels(monkeypatch):
    learned = []
    monkeypatch.setattr(shadow, "train", lambda *args: learned.append(args[1]) or train(*args))
    found = QUICK.owning(OWNED)(Victim(MODEL, answer="label"), QUERIES, CLONE)
    assert found.queries == 100
    assert set(learned[0][:, :4].flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("reads", ["label", "standardized2"])
def test_the_clone_learns_the_recovered_answers(reads, monkeypatch):
    """With the reading as KnockoffNets has it, from the clone's own weights and the same seeds."""
    recovered = {"label": lambda answers: answers.flip(1), "standardized2": lambda answers: answers}
    monkeypatch.setattr(Shadow, "_recover", lambda *given: recovered[reads](given[-1]))
    found = replace(QUICK, reading=reads).owning(OWNED)(Victim(MODEL), QUERIES, CLONE)
    plain = KnockoffNets(query_budget=100, epochs=2, batch_size=32, reading=reads)
    wanted = plain(Victim(lambda images: recovered[reads](MODEL(images))), QUERIES, CLONE)
    assert same_bits(found.clone, wanted.clone)


def test_the_control_recovers_answers_to_other_images(monkeypatch):
    """All else is the same, so what its clone reaches the thief's own images teach."""
    given, learned, run = [], [], Training.run
    monkeypatch.setattr(Shadow, "_recover", lambda *args: given.append(args[-1]) or args[-1])
    monkeypatch.setattr(Training, "run", lambda *args: learned.append(args[2]) or run(*args))
    control, usual = (
        replace(QUICK, reading=reads).owning(OWNED)(Victim(MODEL), QUERIES, CLONE)
        for reads in ("shuffled", "standardized2")
    )
    other, own = given
    assert torch.equal(control.transfer_set[1], own) and torch.equal(usual.transfer_set[1], own)
    assert ((other - own).abs().amax(1) < 1e-6).double().mean() < 0.1
    torch.testing.assert_close(other.sort(0).values, own.sort(0).values)
    assert torch.equal(learned[0], reading("standardized2")(other))
    assert torch.equal(learned[1], reading("standardized2")(own))


# as all attacks


def test_queries_are_exact():
    victim = Victim(MODEL, query_budget=100)
    images, answers = QUICK.owning(OWNED)(victim, QUERIES, CLONE).transfer_set
    assert victim.queries == len(images) == 100
    assert torch.equal(answers, Victim(MODEL)(to_float(images)))
    with pytest.raises(QueryBudgetExceeded, match="needs 100 queries, the victim allows 99"):
        QUICK.owning(OWNED)(Victim(MODEL, query_budget=99), QUERIES, CLONE)


def test_labeled_images_that_are_not_there_or_do_not_fit_cost_no_query():
    victim = Victim(MODEL)
    with pytest.raises(RuntimeError, match=r"Shadow needs labeled images: call Shadow\(\.\."):
        QUICK(victim, QUERIES, CLONE)
    wide = ImageSet(torch.zeros(3, 1, 8, 9, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"owning: wanted images of \[1, 8, 8\] .* \[1, 8, 9\]"):
        QUICK.owning(wide)(victim, QUERIES, CLONE)
    assert victim.queries == 0


@pytest.mark.slow
def test_same_seed_same_bits():
    before = torch.get_rng_state()
    a, b, c = whole(0), whole.__wrapped__(0), whole(1)
    assert same_bits(a, b) and not same_bits(a, c)
    assert torch.equal(torch.get_rng_state(), before)


# The checkpoints: 0 the clone's first weights, 1-3 answers, 4-6 and 7-9 a shadow without and with
# the defense, 10-15 another, 16 the recovered answers, 17-18 the clone's epochs.
@pytest.mark.slow
@pytest.mark.parametrize("when", [0.5, 2, 5, 6.5, 8, 9.5, 13.5, 16, 16.5, 18])
def test_killed_run_goes_on_bit_identically(when, tmp_path, monkeypatch):
    monkeypatch.setattr(attack, "QUERIES_PER_SAVE", 40)
    run, wanted = QUICK.owning(OWNED), whole(0)
    with monkeypatch.context() as patch:
        kill_at(patch, when)
        with pytest.raises(Killed):
            run(Victim(MODEL), QUERIES, CLONE, resume_dir=tmp_path)
    again = toy_model(seed=9, dropout=0.3)  # its weights are not those of the first run
    resumed = run(Victim(MODEL, query_budget=100), QUERIES, again, resume_dir=tmp_path)
    assert same_bits(wanted, resumed.clone) and resumed.queries == 100
    nothing = Victim(MODEL, query_budget=0)
    assert same_bits(run(nothing, QUERIES, again, resume_dir=tmp_path).clone, wanted)
    other = ImageSet(OWNED.images, OWNED.labels.flip(0))
    with pytest.raises(ValueError, match="belongs to other settings: labeled is "):
        QUICK.owning(other)(Victim(MODEL), QUERIES, CLONE, resume_dir=tmp_path)


def test_a_diverging_shadow_names_its_learning_rate():
    with pytest.raises(
        FloatingPointError, match=r"shadow 0, whose lr is shadow_lr: .* loss is nan"
    ):
        replace(QUICK, shadow_lr=1e30).owning(OWNED)(Victim(MODEL), QUERIES, CLONE)


@pytest.mark.parametrize(
    "argument",
    [
        {"shadows": 0},
        {"shadow_epochs": 0},
        {"shadow_lr": 0.0},
        {"shadow_batch_size": 0},
        {"shadow_pad": -1},
        {"misdirect": 0.0},
        {"proxy_share": 0.0},
        {"pictures": 1},
        {"pairs": 0},
        {"recovery_epochs": 0},
        {"reading": "loud"},
    ],
)
def test_arguments_are_checked(argument):
    with pytest.raises(ConfigError, match=f"{next(iter(argument))}: wanted"):
        Shadow(**argument)


def test_settings_survive_yaml_and_bfloat16():
    run = Shadow.from_dict({**QUICK.to_dict(), "precision": "bfloat16"})
    clone = run.owning(OWNED)(Victim(MODEL), QUERIES, CLONE).clone
    assert next(clone.parameters()).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clone_trains_on_its_device():
    found = QUICK.owning(OWNED)(Victim(MODEL), QUERIES, copy.deepcopy(CLONE).cuda())
    assert all(state.is_cuda for state in found.clone.state_dict().values())
