import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import CLASSES, QUERIES, TEST_IMAGES, TEST_LABELS, toy_model, toy_victim

from divqat.attacks import KnockoffNets
from divqat.attacks.art import art_classifier
from divqat.data import to_float
from divqat.metrics import accuracy, predict
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SHAPE = (1, 8, 8)
BUDGET, EPOCHS, BATCH, LR = 64, 4, 16, 0.02
SEEDS = range(16)
T_15 = 4.073  # Student's t, 15 degrees of freedom, two-sided 0.1 %


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    """What the tests use of ART, which writes to the home folder when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        attacks = pytest.importorskip("art.attacks.extraction", reason="needs divqat[art]")
        estimators = pytest.importorskip("art.estimators.classification")
    return SimpleNamespace(attacks=attacks, thief=estimators.PyTorchClassifier)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


def classifier_of(victim):
    return art_classifier(victim, num_classes=CLASSES, image_shape=SHAPE)


def clone_accuracy(clone):
    return accuracy(predict(clone.eval(), TEST_IMAGES), TEST_LABELS)


def steal_with_art(art, victim, seed, *, soft, epochs=EPOCHS, attack="KnockoffNets"):
    """The accuracy of a clone trained as ours are: same weights, optimizer and learning rates."""
    clone = toy_model(seed)
    optimizer = torch.optim.SGD(
        clone.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * BUDGET // BATCH
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    thief = art.thief(clone, torch.nn.CrossEntropyLoss(), SHAPE, CLASSES, optimizer=optimizer)
    np.random.seed(seed)
    torch.manual_seed(seed)
    attack = getattr(art.attacks, attack)(
        classifier_of(victim),
        batch_size_fit=BATCH,
        batch_size_query=50,
        nb_epochs=epochs,
        nb_stolen=BUDGET,
        use_probability=soft,
    )
    attack.verbose = False
    attack.extract(to_float(QUERIES).numpy(), thieved_classifier=thief)
    return clone_accuracy(clone)


def differ(a, b):
    """Whether the means of paired samples differ, in a t-test that errs once in a thousand."""
    gap = np.subtract(a, b)
    return abs(gap.mean()) > T_15 * gap.std(ddof=1) / math.sqrt(len(gap))


@pytest.mark.parametrize("answer", ["probs", "label"])
def test_knockoff_of_art_steals_as_much_as_ours(art, model, answer):
    soft = answer == "probs"
    ours = KnockoffNets(query_budget=BUDGET, epochs=EPOCHS, batch_size=BATCH, lr=LR)
    theirs, mine, halved = [], [], []
    for seed in SEEDS:
        victims = [Victim(model, answer=answer, query_budget=BUDGET) for _ in range(2)]
        theirs.append(steal_with_art(art, victims[0], seed, soft=soft))
        attack = KnockoffNets.from_dict({**ours.to_dict(), "seed": seed})
        mine.append(clone_accuracy(attack(victims[1], QUERIES, toy_model(seed)).clone))
        assert victims[0].queries == victims[1].queries == BUDGET
        halved.append(steal_with_art(art, Victim(model), seed, soft=soft, epochs=EPOCHS // 2))
    assert 0.7 < np.mean(mine) < 0.95  # where a difference would show
    assert not differ(theirs, mine)
    assert differ(halved, mine)  # the test sees half the epochs


def test_labels_are_learned_from_probabilities_unless_asked(art, model):
    """A trap of ART: what a defense does to probabilities is not even seen by default."""
    labels = steal_with_art(art, Victim(model, answer="label"), 0, soft=True)
    assert steal_with_art(art, Victim(model), 0, soft=False) == labels


def test_copycat_counts_too(art, model):
    victim = Victim(model, query_budget=BUDGET)
    assert steal_with_art(art, victim, 0, soft=True, attack="CopycatCNN") > 0.5
    assert victim.remaining == 0


@pytest.mark.parametrize(
    "shown", [{}, {"answer": "label"}, {"answer": "topk", "k": 2}, {"defense": lambda p, x: p**2}]
)
def test_classifier_answers_like_the_victim(art, model, shown):
    images = to_float(QUERIES[:30])
    victim = Victim(model, **shown)
    answers = classifier_of(victim).predict(images.numpy(), batch_size=7)
    assert answers.dtype == np.float32 and victim.queries == 30
    # Batches of other sizes may round differently.
    torch.testing.assert_close(torch.from_numpy(answers), Victim(model, **shown)(images))


def test_budget_holds(art, model):
    victim = Victim(model, query_budget=20)
    with pytest.raises(QueryBudgetExceeded, match="got 10 images, but 0 of 20"):
        classifier_of(victim).predict(to_float(QUERIES[:30]).numpy(), batch_size=10)
    assert victim.queries == 20


def test_mistakes_cost_no_query(art, model):
    victim = Victim(model)
    images = to_float(QUERIES[:3]).numpy()
    for wrong, message in [
        (QUERIES[:3].float().numpy(), r"wanted \[-1, 1\], got .* to .*to_float"),
        (images * 9, r"wanted \[-1, 1\]"),
        (images.transpose(0, 2, 3, 1), r"wanted \[N, 1, 8, 8\], got \[3, 8, 8, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            classifier_of(victim).predict(wrong)
    with pytest.raises(TypeError, match=r"victim: wanted a divqat\.Victim, got Sequential"):
        classifier_of(model)
    assert victim.queries == 0
    for classes in (3, 5):
        with pytest.raises(
            ValueError, match=f"num_classes: wanted 4 like the victim, got {classes}"
        ):
            art_classifier(victim, num_classes=classes, image_shape=SHAPE).predict(images)


def test_missing_art_is_said(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "art.estimators.classification", None)
    with pytest.raises(ImportError, match=r"pip install 'divqat\[art\]'"):
        classifier_of(Victim(model))
