from dataclasses import replace

import pytest
import torch
from toys import QUERIES, TEST_IMAGES, TEST_LABELS, same_bits, toy_model, toy_victim

from divqat._util.settings import ConfigError
from divqat.attacks import KnockoffNets, Selective
from divqat.attacks.selective import most_confident
from divqat.data import to_float
from divqat.evaluate import Grid
from divqat.metrics import accuracy, predict
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("one_thread")
CLONE = toy_model(seed=1)
QUICK = Selective(epochs=2, query_budget=100, batch_size=32)

ANSWERS = torch.tensor(
    [
        [0.9, 0.1, 0.0],  # class 0, the second most_confident of four
        [0.2, 0.7, 0.1],  # class 1
        [0.6, 0.2, 0.2],
        [0.2, 0.2, 0.6],  # class 2, the only one
        [0.8, 0.1, 0.1],
        [0.3, 0.7, 0.0],  # as sure as row 1
        [0.95, 0.05, 0.0],
        [0.4, 0.5, 0.1],
    ]
)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (0.5, [0, 1, 3, 5, 6]),  # 2 of 4, 2 of 3 (1.5, rounded to even), 1 of 1
        (0.25, [1, 3, 6]),  # 1 of 4; 0.75 of 3, and of equals the earlier; 0.25 of 1: one at least
        (0.75, [0, 1, 3, 4, 5, 6]),
        (1.0, list(range(8))),
        (1e-9, [1, 3, 6]),
    ],
)
def test_surest_rows_by_hand(share, wanted):
    assert most_confident(ANSWERS, share).tolist() == wanted


def test_labels_are_equally_sure_and_ties_in_a_row_go_to_the_lower_class():
    labels = torch.eye(2)[[1, 0, 1, 1, 0, 1, 0, 0]]
    assert most_confident(labels, 0.5).tolist() == [0, 1, 2, 4]
    even = torch.full((6, 3), 1 / 3)
    assert most_confident(even, 0.5).tolist() == [0, 1, 2]
    assert most_confident(torch.zeros(4, 2), 0.5).tolist() == [0, 1]  # rounded to nothing


def test_clone_learns_the_kept_rows_and_all_are_counted(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "divqat.attacks.knockoff.reading", lambda text: lambda kept: seen.append(kept) or kept
    )
    victim = Victim(model, query_budget=100)
    found = replace(QUICK, keep=0.3)(victim, QUERIES, CLONE)
    images, answers = found.transfer_set
    assert found.queries == victim.queries == len(images) == len(answers) == 100
    assert torch.equal(answers, Victim(model)(to_float(images)))
    (kept,) = seen
    # Sorted by hand: class by class, the most certain first, the earlier of equals first.
    wanted = []
    for label in range(4):
        mine = [i for i, row in enumerate(answers.tolist()) if row.index(max(row)) == label]
        mine.sort(key=lambda i: (-max(answers[i].tolist()), i))
        wanted += mine[: max(1, round(0.3 * len(mine)))]
    assert 25 < len(wanted) < 35
    assert torch.equal(kept, answers[sorted(wanted)])


def test_keeping_all_is_knockoff(model):
    plain = KnockoffNets(epochs=2, query_budget=100, batch_size=32)
    kept = replace(QUICK, keep=1.0)(Victim(model), QUERIES, CLONE)
    assert same_bits(kept.clone, plain(Victim(model), QUERIES, CLONE).clone)
    assert not same_bits(kept.clone, QUICK(Victim(model), QUERIES, CLONE).clone)


def test_a_victim_that_lies_where_it_is_unsure_is_learned_better(model):
    """Half of its answers are the next class, with less certainty than the true ones."""

    def lying(probs, images):
        lies = (images.flatten(1).sum(1) * 1000).long() % 2 == 0
        named = torch.where(lies, probs.argmax(1) + 1, probs.argmax(1)) % 4
        top = torch.where(lies, 0.55, 0.7)[:, None]
        return ((1 - top) / 3).expand(-1, 4).scatter(1, named[:, None], top)

    scores = []
    for kind in (Selective, KnockoffNets):
        attack = kind(epochs=10, batch_size=16, query_budget=400, reading="label")
        clone = attack(Victim(model, defense=lying), QUERIES, CLONE).clone
        scores.append(accuracy(predict(clone, TEST_IMAGES), TEST_LABELS))
    assert scores[0] > 0.8 and scores[0] > scores[1] + 0.1, scores


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, "half"])
def test_share_is_checked(keep):
    with pytest.raises(ConfigError, match="keep: wanted a number above 0 at most 1, got"):
        Selective(keep=keep)
    with pytest.raises(ConfigError, match=f"selective:keep={keep}: keep: wanted"):
        Grid(attacks=(f"selective:keep={keep}",))
