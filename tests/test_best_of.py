import pytest
import torch
from toys import QUERIES, same_bits, toy_images, toy_model, toy_victim

from divqat.attacks import KnockoffNets
from divqat.attacks.best_of import BestOf
from divqat.data import ImageSet
from divqat.metrics import accuracy, predict
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")

CLONE = toy_model(seed=1)
HOLDOUT = ImageSet(*toy_images(100, seed=4))
IDLE = KnockoffNets(epochs=1, query_budget=60, lr=1e-9)
GOOD = KnockoffNets(epochs=4, query_budget=300, batch_size=32)
BOTH = {"idle": IDLE, "good": GOOD}


@pytest.fixture(scope="module")
def model():
    return toy_victim()


def test_best_clone_wins_and_all_queries_count(model):
    victim = Victim(model)
    found = BestOf(BOTH, HOLDOUT)(victim, QUERIES, CLONE)
    alone = {name: attack(Victim(model), QUERIES, CLONE) for name, attack in BOTH.items()}
    assert found.name == "good"
    assert same_bits(found.clone, alone["good"].clone)
    assert torch.equal(found.transfer_set[0], alone["good"].transfer_set[0])
    assert found.queries == victim.queries == 360
    assert {name: each.queries for name, each in found.extractions.items()} == {
        "idle": 60,
        "good": 300,
    }
    for name, share in found.accuracies.items():
        assert same_bits(found.extractions[name].clone, alone[name].clone)
        assert share == accuracy(predict(alone[name].clone, HOLDOUT.images), HOLDOUT.labels)
    assert found.accuracies["good"] > 0.8 > found.accuracies["idle"]


def test_the_holdout_decides(model):
    idle = IDLE(Victim(model), QUERIES, CLONE).clone
    holdout = ImageSet(HOLDOUT.images, predict(idle, HOLDOUT.images).argmax(1))
    found = BestOf(BOTH, holdout)(Victim(model), QUERIES, CLONE)
    assert (found.name, found.accuracies["idle"]) == ("idle", 1.0)
    assert same_bits(found.clone, idle)


def test_ties_go_to_the_earlier(model):
    for names in (["b", "a"], ["a", "b"]):
        found = BestOf(dict.fromkeys(names, IDLE), HOLDOUT)(Victim(model), QUERIES, CLONE)
        assert found.name == names[0]


def test_small_budget_keeps_what_was_found_and_goes_on(model, tmp_path):
    whole = BestOf(BOTH, HOLDOUT)(Victim(model), QUERIES, CLONE)
    victim = Victim(model, query_budget=359)
    with pytest.raises(QueryBudgetExceeded, match="needs 300 queries, the victim allows 299"):
        BestOf(BOTH, HOLDOUT)(victim, QUERIES, CLONE, resume_dir=tmp_path)
    assert victim.queries == 60
    victim = Victim(model, query_budget=300)
    found = BestOf(BOTH, HOLDOUT)(victim, QUERIES, CLONE, resume_dir=tmp_path)
    assert same_bits(found.clone, whole.clone)
    assert (found.queries, victim.queries) == (360, 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "idle"]


def test_watch_sees_the_clones_of_all(model):
    seen = []
    BestOf(BOTH, HOLDOUT)(Victim(model), QUERIES, CLONE, watch=lambda *args: seen.append(args[0]))
    assert len(seen) == 1 + 4


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="at least one attack and one image, got 0 and 100"):
        BestOf({}, HOLDOUT)
    with pytest.raises(ValueError, match="got 2 and 0"):
        BestOf(BOTH, HOLDOUT.subset(slice(0)))
    for name in ("", "a/b", "..", "nul"):
        with pytest.raises(ValueError, match="wanted the name of a folder"):
            BestOf({name: IDLE}, HOLDOUT)
