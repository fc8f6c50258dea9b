"""What all attacks that ask about a given query set must do."""

from dataclasses import replace
from functools import cache

import pytest
import torch
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

from divqat.attacks import KnockoffNets, attack
from divqat.attacks.copycat import CopycatCNN
from divqat.attacks.knockoff_adaptive import KnockoffAdaptive
from divqat.attacks.s4l import S4L
from divqat.attacks.selective import Selective
from divqat.attacks.skeptical import SkepticalStudent
from divqat.attacks.smoothing import Smoothing
from divqat.data import to_float
from divqat.metrics import accuracy, predict
from divqat.models import build
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")
ATTACKS = [
    KnockoffAdaptive(groups=8, round_size=40),
    CopycatCNN(),
    Smoothing(mirror=False, shift=0.05, angle=5.0),
    S4L(),
    SkepticalStudent(),
    Selective(),
]
each = pytest.mark.parametrize("settings", ATTACKS, ids=lambda a: type(a).__name__)


def lenet(seed=1):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build("lenet", in_channels=1, num_classes=4, image_size=8)


def quick(settings, **changes):
    return replace(settings, epochs=2, batch_size=32, query_budget=100, pad=1, **changes)


MODEL = toy_victim()


@cache
def whole(settings):
    """An uninterrupted run."""
    return quick(settings)(Victim(MODEL), QUERIES, lenet())


def right(settings, victim, budget):
    settings = replace(settings, epochs=8, batch_size=16, query_budget=budget)
    fits_all = not isinstance(settings, SkepticalStudent)
    clone = settings(victim, QUERIES, toy_model(seed=1) if fits_all else lenet()).clone
    return accuracy(predict(clone, TEST_IMAGES), TEST_LABELS)


@pytest.mark.slow
@each
def test_clone_is_far_better_than_chance_and_more_queries_help(settings):
    few, many = (right(settings, Victim(MODEL), budget) for budget in (24, 400))
    assert many > 0.75 and many > few + 0.1, (few, many)


@each
def test_shuffled_answers_teach_nothing(settings):
    shuffle = torch.Generator().manual_seed(0)

    def shuffled(images):
        with torch.no_grad():
            return MODEL(images)[torch.randperm(len(images), generator=shuffle)]

    # The copies of one image get answers to others, of which the mean says nothing either.
    assert abs(right(settings, Victim(shuffled), 200) - 0.25) < 0.15


@each
def test_budget_is_exact(settings):
    victim = Victim(MODEL, query_budget=100)
    extraction = quick(settings)(victim, QUERIES, lenet())
    images, answers = extraction.transfer_set
    asked = 99 if isinstance(settings, Smoothing) else 100  # whole images only, three each
    assert extraction.queries == victim.queries == len(images) == len(answers) == asked
    assert torch.equal(answers, Victim(MODEL)(to_float(images)))
    rows = {image.numpy().tobytes() for image in images}
    assert len(rows) == asked  # without replacement
    if not isinstance(settings, Smoothing):
        assert rows <= {image.numpy().tobytes() for image in QUERIES}


@each
def test_too_small_a_budget_costs_no_query(settings):
    victim = Victim(MODEL, query_budget=98)
    with pytest.raises(QueryBudgetExceeded, match=r"needs (99|100) queries, the victim allows 98"):
        quick(settings)(victim, QUERIES, lenet())
    assert victim.queries == 0


@each
def test_same_seed_same_bits(settings):
    before = torch.get_rng_state()
    a, b = whole(settings), quick(settings)(Victim(MODEL), QUERIES, lenet())
    assert same_bits(a.clone, b.clone)
    assert torch.equal(a.transfer_set[0], b.transfer_set[0])
    assert torch.equal(torch.get_rng_state(), before)
    other = quick(settings, seed=1)(Victim(MODEL), QUERIES, lenet())
    assert not torch.equal(other.transfer_set[0], a.transfer_set[0])


# The checkpoints: 0 the first weights, 1-3 answers (40 + 40 + the rest), 4-5 the epochs.
@pytest.mark.parametrize("when", [0.5, 1, 2.5, 4, 5])
@each
def test_killed_run_goes_on_bit_identically(settings, when, tmp_path, monkeypatch):
    monkeypatch.setattr(attack, "QUERIES_PER_SAVE", 40)
    wanted = whole(settings)
    with monkeypatch.context() as patch:
        kill_at(patch, when)
        with pytest.raises(Killed):
            quick(settings)(Victim(MODEL, query_budget=100), QUERIES, lenet(), resume_dir=tmp_path)
    stored = 40 * max(0, int(when + 0.5) - 1) if when < 4 else wanted.queries
    # Exactly what is left is enough, and the initial weights are those of the first run.
    victim = Victim(MODEL, query_budget=wanted.queries - stored)
    resumed = quick(settings)(victim, QUERIES, lenet(seed=9), resume_dir=tmp_path)
    assert same_bits(wanted.clone, resumed.clone)
    for a, b in zip(wanted.transfer_set, resumed.transfer_set, strict=True):
        assert torch.equal(a, b)
    assert (victim.remaining, resumed.queries) == (0, wanted.queries)


@each
def test_result_has_the_given_architecture_and_no_hooks(settings):
    clone = whole(settings).clone
    assert list(clone.state_dict()) == list(lenet().state_dict())
    assert not any(layer._forward_hooks or layer.training for layer in clone.modules())


@each
def test_diverging_clone_is_an_error(settings):
    with pytest.raises(FloatingPointError, match="lower lr"):
        quick(settings, lr=1e30)(Victim(MODEL), QUERIES, lenet())


@each
def test_settings_survive_yaml_and_bfloat16(settings):
    settings = type(settings).from_dict({**settings.to_dict(), "precision": "bfloat16"})
    clone = quick(settings)(Victim(MODEL), QUERIES, lenet()).clone
    assert next(clone.parameters()).dtype == torch.float32


@pytest.mark.parametrize("answer", [{}, {"answer": "topk", "k": 2}])
def test_copycat_learns_labels_whatever_is_shown(answer):
    stolen = quick(CopycatCNN())(Victim(MODEL, **answer), QUERIES, lenet())
    labels = quick(KnockoffNets())(Victim(MODEL, answer="label"), QUERIES, lenet())
    assert same_bits(stolen.clone, labels.clone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each
def test_clone_trains_on_its_device(settings):
    extraction = quick(settings)(Victim(MODEL), QUERIES, lenet().cuda())
    assert next(extraction.clone.parameters()).is_cuda
    assert extraction.transfer_set[1].device.type == "cpu"
