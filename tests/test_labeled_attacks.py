"""Attacks that own labeled images: relabel, fine-tune, labeled-only."""

import copy
import math
import pickle
import sys
from dataclasses import replace
from itertools import permutations

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
    toy_images,
    toy_model,
    toy_victim,
)

from divqat._util.settings import ConfigError
from divqat.attacks import (
    DetectAndDrop,
    FineTune,
    KnockoffNets,
    LabeledOnly,
    Relabel,
    Shadow,
    attack,
)
from divqat.attacks.relabel import NEVER, Relabeled, class_map_solver
from divqat.data import ImageSet, to_float
from divqat.metrics import accuracy, predict
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("scipy.optimize")  # scikit-learn brings it

CLONE = toy_model(seed=1, dropout=0.3)
OWNED = ImageSet(*toy_images(60, seed=6))
SHOWN = torch.tensor([2, 0, 3, 1])  # true class 0 is answered with 2 ...
QUICK = {"epochs": 2, "query_budget": 100, "batch_size": 32, "pad": 1}
ATTACKS = [
    Relabel(**QUICK),
    Relabel(**QUICK, map="any"),
    FineTune(**QUICK, tune_epochs=3, tune_batch_size=20),
    LabeledOnly(epochs=3, batch_size=20, pad=1),
]
each = pytest.mark.parametrize("settings", ATTACKS, ids=lambda a: type(a).__name__)
MODEL = toy_victim()


def permuted(images):
    """Knows every image, and names every class wrongly."""
    with torch.no_grad():
        return MODEL(images)[:, SHOWN.argsort()]


def right(clone):
    return accuracy(predict(clone, TEST_IMAGES), TEST_LABELS)


def asked(settings):
    return 0 if isinstance(settings, LabeledOnly) else 100


# relabel


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["permutation", "any"])
def test_relabel_undoes_a_permutation(kind):
    settings = {"epochs": 10, "batch_size": 16, "query_budget": 400}
    plain = KnockoffNets(**settings)(Victim(permuted), QUERIES, CLONE).clone
    clone = Relabel(**settings, map=kind).owning(OWNED)(Victim(permuted), QUERIES, CLONE).clone
    assert torch.equal(clone.meaning, SHOWN.argsort())
    assert right(plain) < 0.1 and right(clone) > 0.8
    # Exactly: the same clone, and each class's logit where it belongs.
    assert same_bits(clone.clone, plain)
    assert torch.equal(predict(clone, TEST_IMAGES), predict(plain, TEST_IMAGES)[:, SHOWN])


@pytest.mark.slow
def test_an_honest_victim_is_left_alone():
    settings = {"epochs": 10, "batch_size": 16, "query_budget": 400}
    clone = Relabel(**settings).owning(OWNED)(Victim(MODEL), QUERIES, CLONE).clone
    assert clone.meaning.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "counts", "wanted"),
    [
        ("any", [[0, 5, 1], [0, 7, 0], [4, 0, 3]], [1, 1, 0]),  # two classes mean 1, none means 2
        ("any", [[0, 0, 0], [9, 1, 0], [0, 2, 1]], [0, 0, 1]),  # 0 is never answered: it stays
        ("any", [[2, 2, 2], [3, 3, 0], [4, 4, 0]], [0, 1, 0]),  # equal: itself, else the first
        ("permutation", [[0, 5, 1], [0, 7, 0], [4, 0, 3]], [2, 1, 0]),  # 1 + 7 + 4
        ("permutation", [[0, 9, 8], [0, 9, 0], [0, 0, 0]], [2, 1, 0]),  # greedily: 9 + 0 + 0
        ("permutation", [[0, 0, 0], [0, 0, 0], [0, 0, 0]], [0, 1, 2]),  # nothing known: as it was
        ("permutation", [[0, 0, 6], [0, 0, 0], [1, 0, 0]], [2, 1, 0]),  # 1 is never answered
    ],
)
def test_maps_by_hand(kind, counts, wanted):
    assert class_map_solver(kind)(torch.tensor(counts)).tolist() == wanted


def test_permutation_agrees_with_trying_all():
    torch.manual_seed(0)
    for _ in range(20):
        counts = torch.randint(4, (5, 5))
        found = class_map_solver("permutation")(counts).tolist()
        assert sorted(found) == list(range(5))

        def value(order, counts=counts):
            agreeing = sum(int(counts[j, k]) for j, k in enumerate(order))
            return agreeing, sum(j == k for j, k in enumerate(order))

        assert value(found) == max(map(value, permutations(range(5))))


def test_relabeled_logits_by_hand():
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.5], [200.0, 300.0, -400.0, 0.0]])
    model = Relabeled(nn.Identity(), torch.tensor([2, 2, 0, 3])).eval()
    got = model(logits).double()
    for row, (a, b, c, d) in zip(got, logits.tolist(), strict=True):
        top = max(a, b)
        both = top + math.log(math.exp(a - top) + math.exp(b - top))
        wanted = torch.tensor([c, NEVER, both, d], dtype=torch.float64)
        torch.testing.assert_close(row, wanted, rtol=1e-6, atol=0)
    # Probabilities of classes that mean one add up.
    clean, summed = logits.double().softmax(1), got.softmax(1)
    torch.testing.assert_close(summed[:, 2], clean[:, 0] + clean[:, 1], rtol=0, atol=1e-7)
    assert torch.equal(summed[:, 1], torch.zeros(2, dtype=torch.float64))
    permuted = Relabeled(nn.Identity(), torch.tensor([1, 2, 3, 0]))(logits)
    assert torch.equal(permuted, logits[:, [3, 0, 1, 2]])  # to the bit


def test_relabeled_clone_is_copied_stored_and_trained():
    clone = Relabel(**QUICK).owning(OWNED)(Victim(permuted), QUERIES, CLONE).clone
    assert not any(module.training for module in clone.modules())
    images = to_float(TEST_IMAGES[:8])
    with torch.no_grad():
        wanted = clone(images)
        for other in (copy.deepcopy(clone), pickle.loads(pickle.dumps(clone))):
            assert torch.equal(other(images), wanted) and wanted.shape == (8, 4)
    merged = Relabeled(copy.deepcopy(clone.clone), torch.tensor([0, 0, 0, 3]))
    nn.functional.cross_entropy(merged(images), torch.tensor([0, 3] * 4)).backward()
    assert all(weight.grad.isfinite().all() for weight in merged.parameters())


def test_relabel_watches_relabeled_clones():
    seen = []
    settings = replace(ATTACKS[0], epochs=3)
    found = settings.owning(OWNED)(
        Victim(permuted), QUERIES, CLONE, watch=lambda c, n: seen.append((n, copy.deepcopy(c)))
    )
    assert [count for count, _ in seen] == [1, 2, 3]
    assert all(isinstance(clone, Relabeled) and not clone.training for _, clone in seen)
    assert same_bits(seen[-1][1], found.clone)


def test_a_permutation_without_scipy_costs_no_query(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    victim = Victim(MODEL)
    with pytest.raises(ImportError, match=r"scipy\.optimize is missing: pip install 'divqat\[data"):
        Relabel(**QUICK).owning(OWNED)(victim, QUERIES, CLONE)
    assert victim.queries == 0
    assert Relabel(**QUICK, map="any").owning(OWNED)(victim, QUERIES, CLONE).queries == 100


# fine-tune and labeled-only


@pytest.mark.slow
def test_fine_tuning_recovers_from_a_permutation():
    settings = {"epochs": 6, "batch_size": 16, "query_budget": 300}
    plain = KnockoffNets(**settings)(Victim(permuted), QUERIES, CLONE)
    victim = Victim(permuted)
    tuned = FineTune(**settings, tune_epochs=20, tune_lr=0.05).owning(OWNED)(victim, QUERIES, CLONE)
    assert right(plain.clone) < 0.1 and right(tuned.clone) > 0.7
    assert tuned.queries == victim.queries == 300
    for a, b in zip(plain.transfer_set, tuned.transfer_set, strict=True):
        assert torch.equal(a, b)


def test_fine_tuning_goes_on_from_the_knockoff():
    """Its second training is that of the labeled images alone, from the weights of the first."""
    first = KnockoffNets(**QUICK)(Victim(MODEL), QUERIES, CLONE).clone
    second = LabeledOnly(epochs=3, lr=0.03, batch_size=20, pad=1).owning(OWNED)
    tuned = replace(ATTACKS[2], tune_lr=0.03).owning(OWNED)
    found = tuned(Victim(MODEL), QUERIES, CLONE).clone
    assert same_bits(found, second(Victim(MODEL), QUERIES, first).clone)
    assert not same_bits(found, first)


def test_fine_tuning_counts_its_epochs_on():
    seen = []
    found = ATTACKS[2].owning(OWNED)(
        Victim(MODEL), QUERIES, CLONE, watch=lambda c, n: seen.append((n, copy.deepcopy(c)))
    )
    assert [count for count, _ in seen] == [1, 2, 3, 4, 5]
    assert same_bits(seen[-1][1], found.clone) and not found.clone.training


def test_diverging_fine_tuning_names_its_learning_rate():
    extreme = replace(ATTACKS[2], tune_lr=1e30).owning(OWNED)
    with pytest.raises(FloatingPointError, match=r"lr is tune_lr: .* loss is nan .* lower lr"):
        extreme(Victim(MODEL), QUERIES, CLONE)


def test_labeled_images_alone_ask_nothing():
    victim = Victim(MODEL, query_budget=0)
    found = LabeledOnly(epochs=20).owning(OWNED)(victim, QUERIES, CLONE)
    assert found.queries == victim.queries == 0 and not LabeledOnly.asks
    assert [tuple(part.shape) for part in found.transfer_set] == [(0, 1, 8, 8), (0, 4)]
    assert right(found.clone) > 0.7
    # Nothing of the victim is in it.
    other = LabeledOnly(epochs=20).owning(OWNED)(Victim(permuted), QUERIES, CLONE)
    assert same_bits(found.clone, other.clone)


# without the victim


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        (ATTACKS[0], {}),
        (ATTACKS[2], {"epochs": 3, "lr": 0.01, "batch_size": 20}),
        (Shadow(**QUICK), {}),
        (DetectAndDrop(**QUICK), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_without_the_victim_labels_alone_are_learned(settings, training):
    victim = Victim(MODEL, query_budget=0)
    found = replace(settings, victim=False).owning(OWNED)(victim, QUERIES, CLONE)
    alone = LabeledOnly(**training, pad=settings.pad).owning(OWNED)(victim, QUERIES, CLONE)
    assert found.queries == victim.queries == len(found.transfer_set[0]) == 0
    assert same_bits(found.clone, alone.clone)


# all of them


@each
def test_owning_none_costs_no_query(settings):
    victim, name = Victim(MODEL), type(settings).__name__
    with pytest.raises(RuntimeError, match=rf"{name} needs labeled images: call {name}\(\.\."):
        settings(victim, QUERIES, CLONE)
    with pytest.raises(RuntimeError):  # no field, so a changed copy forgets them, and says so
        replace(settings.owning(OWNED), seed=1)(victim, QUERIES, CLONE)
    assert victim.queries == 0


@each
def test_labeled_images_that_do_not_fit_cost_no_query(settings):
    victim = Victim(MODEL)
    wide = ImageSet(torch.zeros(3, 1, 8, 9, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"owning: wanted images of \[1, 8, 8\] .* \[1, 8, 9\]"):
        settings.owning(wide)(victim, QUERIES, CLONE)
    beyond = ImageSet(OWNED.images[:2], torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="owning: wanted labels below 4, the clone's classes, got"):
        settings.owning(beyond)(victim, QUERIES, CLONE)
    with pytest.raises(ValueError, match="images: wanted at least one labeled image, got 0"):
        settings.owning(OWNED.subset(slice(0)))
    with pytest.raises(TypeError, match=r"wanted a divqat\.data\.ImageSet, got Tensor"):
        settings.owning(OWNED.images)
    assert victim.queries == 0


@each
def test_queries_are_exact(settings):
    victim = Victim(MODEL, query_budget=100)
    found = settings.owning(OWNED)(victim, QUERIES, CLONE)
    assert found.queries == victim.queries == len(found.transfer_set[0]) == asked(settings)
    if asked(settings):
        with pytest.raises(QueryBudgetExceeded, match="needs 100 queries, the victim allows 99"):
            settings.owning(OWNED)(Victim(MODEL, query_budget=99), QUERIES, CLONE)


@each
def test_same_seed_same_bits(settings):
    before = torch.get_rng_state()
    run = settings.owning(OWNED)
    a, b = (run(Victim(MODEL), QUERIES, CLONE).clone for _ in range(2))
    assert same_bits(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    other = replace(settings, seed=1).owning(OWNED)(Victim(MODEL), QUERIES, CLONE).clone
    assert not same_bits(a, other)


# The checkpoints: 0 the first weights, 1-3 answers, 4-5 the epochs; of fine-tune 6 the weights
# before its second training and 7-9 its epochs; of labeled-only 1-3 the epochs.
@pytest.mark.parametrize("when", [0.5, 2, 3.5, 5, 5.5, 6.5, 9])
@each
def test_killed_run_goes_on_bit_identically(settings, when, tmp_path, monkeypatch):
    monkeypatch.setattr(attack, "QUERIES_PER_SAVE", 40)
    run = settings.owning(OWNED)
    whole = run(Victim(MODEL), QUERIES, CLONE)
    last = {FineTune: 9, Relabel: 5, LabeledOnly: 3}[type(settings)]
    with monkeypatch.context() as patch:
        kill_at(patch, min(when, last))
        with pytest.raises(Killed):
            run(Victim(MODEL), QUERIES, CLONE, resume_dir=tmp_path)
    again = toy_model(seed=9, dropout=0.3)  # its weights are not those of the first run
    resumed = run(Victim(MODEL, query_budget=100), QUERIES, again, resume_dir=tmp_path)
    assert same_bits(whole.clone, resumed.clone)
    assert resumed.queries == asked(settings)
    nothing = Victim(MODEL, query_budget=0)
    assert same_bits(run(nothing, QUERIES, again, resume_dir=tmp_path).clone, whole.clone)


@each
def test_folder_of_other_labeled_images_is_refused(settings, tmp_path):
    settings.owning(OWNED)(Victim(MODEL), QUERIES, CLONE, resume_dir=tmp_path)
    renamed = ImageSet(OWNED.images, OWNED.labels.flip(0))
    for other in (OWNED.subset(slice(59)), renamed):
        with pytest.raises(ValueError, match="belongs to other settings: labeled is "):
            settings.owning(other)(Victim(MODEL), QUERIES, CLONE, resume_dir=tmp_path)


@each
def test_settings_survive_yaml_and_bfloat16(settings):
    settings = type(settings).from_dict({**settings.to_dict(), "precision": "bfloat16"})
    clone = settings.owning(OWNED)(Victim(MODEL), QUERIES, CLONE).clone
    assert next(clone.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (Relabel, {"map": "best"}),
        (FineTune, {"tune_epochs": 0}),
        (FineTune, {"tune_lr": 0.0}),
        (FineTune, {"tune_batch_size": 0}),
        (LabeledOnly, {"epochs": 0}),
    ],
)
def test_arguments_are_checked(kind, argument):
    with pytest.raises(ConfigError, match=f"{next(iter(argument))}: wanted"):
        kind(**argument)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each
def test_clone_trains_on_its_device(settings):
    found = settings.owning(OWNED)(Victim(MODEL), QUERIES, copy.deepcopy(CLONE).cuda())
    assert all(state.is_cuda for state in found.clone.state_dict().values())
