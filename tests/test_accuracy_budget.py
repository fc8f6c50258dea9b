"""The accuracy budget in a training loop of one's own."""

import io
import math
import re
import warnings

import pytest
import torch
from test_train import assert_equal
from testing import randn
from torch import nn
from toys import toy_images, toy_model

import divqat
from divqat.data import to_float
from divqat.nn import AccuracyBudget, DivQATLoss, FakeQuantize, MisdirectionLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(value=0.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def by_hand(points, *, accuracy=lambda w: 0.9 - w / 100, interrupted=None, **settings):
    """A training of six epochs, each of which adds the loss's weight to the only weight of the
    model; a budget of ``points`` below 0.9. Returns budget, model, loss, and each epoch that was
    trained with the model's weight after it."""

    def build():
        model, loss = linear(), DivQATLoss(1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        budget = AccuracyBudget(
            model, loss, lambda model: accuracy(model.weight.item()), reference=0.9, points=points,
            epochs=6, restore=[optimizer, schedule], **settings,
        )  # fmt: skip
        return budget, model, loss

    budget, model, loss = build()
    trained = []
    while not budget.finished:
        model.weight.grad = -torch.ones(1, 1) * loss.final_weight
        for item in budget.restore:
            item.step()
        trained.append((budget.epoch, model.weight.item()))
        budget.step()
        assert budget.restore[1].last_epoch == (budget.epoch or 6)
    return budget, model, loss, trained


FULL = [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0), (4, 5.0), (5, 6.0)]
HALF = [(4, 4.5), (5, 5.0)]
QUARTER = [(4, 4.25), (5, 4.5)]


def test_the_last_model_within_the_budget_is_the_result():
    """Six points below after the last epoch, five after the one before."""
    budget, model, loss, trained = by_hand(5.0)
    assert trained == FULL and model.weight.item() == 5 and float(loss.final_weight) == 1
    found = budget.summary()
    assert found["inside"] and found["weaker"] == 1 and found["share"] == 1
    assert found["attempts"] == [] and [row["epoch"] for row in found["path"]] == [5]
    assert budget.message() == (
        "accuracy budget: epoch 5, 100% of the way from the reference's 90.00%: 85.00%, 5.00 "
        "points below, 5 allowed"
    )
    assert by_hand(6.0)[1].weight.item() == 6


def test_half_the_weight_in_the_last_third():
    budget, model, loss, trained = by_hand(4.6)
    assert trained == FULL + HALF and model.weight.item() == 4.5
    assert budget.strength == 0.5 and float(loss.final_weight) == 0.5
    (attempt,) = budget.summary()["attempts"]
    assert attempt.pop("points_below") == pytest.approx(6)
    assert attempt.pop("validation_accuracy") == pytest.approx(0.84)
    assert attempt == {"weaker": 1, "epoch": 6}


def test_interpolation_after_a_quarter():
    """From 4.5 to 0: 4.5, 4.275, 4.05."""
    budget, model, loss, trained = by_hand(4.2)
    assert trained == FULL + HALF + QUARTER
    assert model.weight.item() == pytest.approx(4.05) and float(loss.final_weight) == 0.25
    found = budget.summary()
    assert [row["weaker"] for row in found["attempts"]] == [1, 0.5]
    assert [row["share"] for row in found["path"]] == [1, 0.95, 0.9]
    assert found["points_below"] == pytest.approx(4.05) and found["weaker"] == 0.25
    assert budget.longest == len(trained) == 10


def test_rewinds_and_start():
    """Two points below at the start already: 6 - 0.2 s with the start at 2."""
    budget, model, _, trained = by_hand(2.5, rewinds=0, start=linear(2.0).state_dict())
    assert trained == FULL and budget.longest == 6
    assert model.weight.item() == pytest.approx(2.4) and budget.summary()["share"] == 0.1
    assert by_hand(4.2, rewinds=1)[3] == FULL + HALF


def test_a_budget_that_is_exceeded_or_leaves_nothing_warns():
    with pytest.warns(UserWarning, match="wanted at most 1 points below 90.00%, got 5.00 at best"):
        budget, model, *_ = by_hand(1.0, accuracy=lambda w: 0.85 - w / 1e6)
    assert model.weight.item() == 0 and not budget.summary()["inside"]
    with pytest.warns(UserWarning, match="nothing is left of the defense: try a warm-up"):
        by_hand(1.0, accuracy=lambda w: 0.9 if w == 0 else 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_hand(4.2)


def test_an_early_end():
    def begun(points, epochs):
        model = linear()
        budget = AccuracyBudget(
            model, DivQATLoss(1.0), lambda model: 0.9 - model.weight.item() / 100, reference=0.9,
            points=points, epochs=6,
        )  # fmt: skip
        for _ in range(epochs):
            with torch.no_grad():
                model.weight += 1
            budget.step()
        return budget, model

    budget, model = begun(5.0, 5)
    with torch.no_grad():
        model.weight += 1  # an epoch of which the budget does not know
    budget.finish()
    budget.finish()
    assert budget.finished and model.weight.item() == 5
    with pytest.raises(RuntimeError, match="step: wanted a training that is not finished"):
        budget.step()
    budget, model = begun(1.0, 2)  # the last third has not begun: from 2 to 0
    budget.finish()
    assert model.weight.item() == pytest.approx(1) and not budget.summary()["attempts"]
    budget, model = begun(1.0, 3)
    assert budget.message() == "accuracy budget: epoch 3 of 6"
    budget, model = begun(1.0, 6)
    assert budget.epoch == 4 and model.weight.item() == 4 and not budget.finished
    assert budget.message().endswith("going back to epoch 4, with 0.5 of the defense's weight")
    with pytest.raises(RuntimeError, match=r"the epochs after 4 repeated with 0\.5 of"):
        budget.finish()


IMAGES, LABELS = toy_images(96, seed=1)
BATCHES = [(to_float(IMAGES), LABELS)]


class Training:
    """A loop over three batches, seeded by the epoch. Its budget is never met."""

    def __init__(self, epochs=3, points=0.01):
        self.model = divqat.prepare(toy_model().eval(), "x86", example_input=to_float(IMAGES[:8]))
        self.quantizer = next(m for m in self.model.modules() if isinstance(m, FakeQuantize))
        self.misdirection = MisdirectionLoss(
            BATCHES, 4, seed=1, kinds=["noise", "rotated"], weight=0.8
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.budget = AccuracyBudget(
            self.model, self.misdirection, self.validate, reference=0.75, points=points,
            epochs=epochs, restore=[self.optimizer, self.schedule],
        )  # fmt: skip
        self.observed = []

    def validate(self, model):
        assert not model.training and not torch.is_grad_enabled()
        # always below, and the same for the same weights
        return 0.5 + 0.1 * torch.sigmoid(model(BATCHES[0][0]).double().mean())

    def epoch(self):
        torch.manual_seed(self.budget.epoch)
        self.observed.append(self.quantizer.observer_enabled)
        if self.budget.epoch == 2:
            divqat.freeze_observers(self.model)
            divqat.freeze_batchnorm(self.model)
        for images, labels in zip(*(part.split(32) for part in BATCHES[0]), strict=True):
            proxies = self.misdirection.draw(images)
            logits = self.model(torch.cat([images, proxies]))
            loss = nn.functional.cross_entropy(logits[: len(images)], labels)
            loss = loss + self.misdirection(logits[len(images) :], proxies)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.schedule.step()
        self.budget.step()

    PARTS = ("model", "optimizer", "schedule", "budget")

    def save(self):
        file = io.BytesIO()
        torch.save({name: getattr(self, name).state_dict() for name in self.PARTS}, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


@pytest.mark.slow
def test_an_interrupted_training_gives_the_same_bits():
    whole, saved = Training(), []
    with pytest.warns(UserWarning, match="accuracy_budget: wanted at most 0.01 points below"):
        while not whole.budget.finished:
            whole.epoch()
            saved.append(whole.save())
    assert len(saved) == whole.budget.longest == 5 and len(whole.budget.summary()["attempts"]) == 2
    # ranges and statistics learn again after going back
    assert whole.observed == [True] * 5
    for state in saved:
        resumed = Training()
        resumed.load(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while not resumed.budget.finished:
                resumed.epoch()
        assert_equal(resumed.model.state_dict(), whole.model.state_dict())
        assert_equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
        assert resumed.budget.summary() == whole.budget.summary()
        assert float(resumed.misdirection.weight) == pytest.approx(0.2)


def test_going_back_restores_the_whole_state():
    training, states = Training(), []
    for _ in range(3):
        states.append(training.save())
        training.epoch()
    assert training.budget.epoch == 2
    before = torch.load(io.BytesIO(states[2]), weights_only=True)
    for name in ("model", "optimizer", "schedule"):
        assert_equal(getattr(training, name).state_dict(), before[name])
    assert float(training.misdirection.weight) == pytest.approx(0.4)


def test_modes_are_restored():
    training = Training()
    training.quantizer.eval()
    before = [module.training for module in training.model.modules()]
    training.budget._accuracy()
    assert [module.training for module in training.model.modules()] == before
    assert True in before and False in before


def test_a_float_start_is_that_of_the_prepared_model():
    """Its BatchNorm has other names than the one that is folded into the convolution."""
    model = toy_model()
    for value in model.parameters():
        nn.init.normal_(value)
    prepared = divqat.prepare(toy_model().eval(), "x86", example_input=to_float(IMAGES[:8]))
    prepared(to_float(IMAGES[:8]))  # its ranges are observed
    loss, common = DivQATLoss(1.0), dict(reference=0.9, points=1, epochs=1)
    budget = AccuracyBudget(prepared, loss, len, start=model.state_dict(), **common)
    wanted = divqat.prepare(model.eval(), "x86", example_input=to_float(IMAGES[:8])).state_dict()
    assert {name for name in wanted if "fake_quantize" not in name} == set(budget.search.start)
    assert_equal(budget.search.start, {name: wanted[name] for name in budget.search.start})
    # that of a prepared model includes its ranges
    budget = AccuracyBudget(prepared, loss, len, start=prepared.state_dict(), **common)
    assert_equal(budget.search.start, prepared.state_dict())


def test_the_weight_of_misdirection():
    def built(**weight):
        return MisdirectionLoss(BATCHES, 4, seed=1, kinds=["noise"], **weight)

    plain, weighted = built(), built(weight=0.8)
    assert plain.state_dict().keys() == weighted.state_dict().keys()
    assert "weight" not in plain.state_dict()
    logits, proxies = randn(8, 4), to_float(IMAGES[:8])
    wanted = plain.targets.terms(logits, None, proxies).loss / 8
    assert plain(logits, proxies).equal(wanted)
    torch.testing.assert_close(weighted(logits, proxies), 0.8 * wanted)
    weighted.set_weight(0)
    assert weighted(logits, proxies) == 0
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight: wanted a number of at least 0, got"):
            built(weight=bad)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("reference: wanted an accuracy from 0 to 1, got nan", dict(reference=math.nan)),
        ("reference: .* got 93; if these are percent, divide by 100", dict(reference=93)),
        ("reference: .* got -0.1", dict(reference=-0.1)),
        ("points: wanted percentage points .* got -1", dict(points=-1)),
        ("points: .*half a point is 0.5, not 0.005.*got 0.005", dict(points=0.005)),
        ("points: .* got nan", dict(points=math.nan)),
        ("epochs: wanted at least 1, got 0", dict(epochs=0)),
        ("rewinds: wanted at least 0, got -1", dict(rewinds=-1)),
        ("losses: wanted at least one", dict(losses=[])),
        ("losses: .* got a DivQATLoss with -1", dict(losses=[DivQATLoss(-1.0)])),
        ("losses: .* got CrossEntropyLoss", dict(losses=nn.CrossEntropyLoss())),
        ("model: wanted a prepared module, got function", dict(model=lambda x: x)),
        ("size mismatch", dict(start={"weight": torch.zeros(2, 2)})),
        ("validate: .* got 93; if these are percent", dict(validate=lambda model: 93.0)),
        ("validate: .* got nan", dict(validate=lambda model: torch.tensor(math.nan))),
        ("validate: .* got None", dict(validate=lambda model: None)),
    ],
)
def test_refusals(message, changes):
    settings = dict(
        model=linear(), losses=DivQATLoss(1.0), validate=lambda model: 0.9, reference=0.9,
        points=0.5, epochs=1,
    )  # fmt: skip
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        AccuracyBudget(**{**settings, **changes}).step()


def test_a_state_of_another_training_is_refused():
    def built(**changes):
        settings = dict(losses=[DivQATLoss(1.0)], reference=0.9, points=0.5, epochs=6)
        return AccuracyBudget(linear(), validate=lambda model: 0.9, **{**settings, **changes})

    state = built().state_dict()
    for name, value in dict(reference=0.8, points=1.0, epochs=7).items():
        with pytest.raises(ValueError, match=f"^{name}: wanted .* got {re.escape(str(value))}"):
            built(**{name: value}).load_state_dict(state)
    with pytest.raises(ValueError, match="losses: wanted 1, as when the training started, got 2"):
        built(losses=[DivQATLoss(1.0)] * 2).load_state_dict(state)
