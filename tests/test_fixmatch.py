"""FixMatch and S4L by a thief with labels, and what they are without the victim."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_s4l import still, task
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
from divqat.attacks import S4L, FixMatch, KnockoffNets
from divqat.attacks.fixmatch import consistency
from divqat.data import ImageSet, to_float
from divqat.metrics import accuracy, predict
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")

CLONE = toy_model(seed=1, dropout=0.3)
OWNED = ImageSet(*toy_images(60, seed=6))
QUICK = {"epochs": 2, "query_budget": 100, "batch_size": 32}
ATTACKS = [FixMatch(**QUICK, ratio=2), S4L(**QUICK, labels=True)]
each = pytest.mark.parametrize("settings", ATTACKS, ids=lambda a: type(a).__name__)
MODEL = toy_victim()


def run(settings, victim=None, **more):
    return settings.owning(OWNED)(victim or Victim(MODEL), QUERIES, CLONE, **more)


def right(clone):
    return accuracy(predict(clone, TEST_IMAGES), TEST_LABELS)


def test_consistency_by_hand():
    weak = torch.tensor([[4.0, 0, 0], [0, 1, 0], [0, 0, 9]], requires_grad=True)
    strong = torch.tensor([[0.0, 1, 2], [3, 0, 0], [1, 1, 1]], requires_grad=True)
    sure = weak.softmax(1).amax(1) >= 0.9
    assert sure.tolist() == [True, False, True]
    losses = [-strong.log_softmax(1)[0, 0], -strong.log_softmax(1)[2, 2]]
    got = consistency(weak, strong, 0.9)
    torch.testing.assert_close(got, sum(losses) / 3)
    got.backward()
    assert weak.grad is None and strong.grad[1].abs().sum() == 0 < strong.grad[0].abs().sum()


def test_loss_of_fixmatch_by_hand():
    """The labels' and the answers' terms, where no pseudo-label is sure enough."""
    clone, targets = still(), torch.tensor([[0.7, 0.1, 0.1, 0.1], [0, 0, 1, 0]])
    few = ImageSet(OWNED.images[:1], OWNED.labels[:1])
    settings = FixMatch(batch_size=2, threshold=1.0, answers=0.5, ratio=3).owning(few)
    images, seen = to_float(QUERIES[:2]), []
    clone.register_forward_hook(lambda module, inputs, logits: seen.append((inputs[0], logits)))
    torch.manual_seed(0)
    got = settings._loss(task(clone))(clone, images, targets, 0.0)
    ((batch, logits),) = seen
    assert len(batch) == 2 + 2 + 2 * 3 * 2 and torch.equal(batch[:2], images)
    for x in batch[2:4]:  # the only labeled image, shifted by at most a pixel of eight
        whole = F.pad(to_float(few.images), (1,) * 4, value=-1)[0, 0]
        assert any(torch.equal(x[0], whole[i : i + 8, j : j + 8]) for i in range(3)
                   for j in range(3))  # fmt: skip
    wanted = 0.5 * F.cross_entropy(logits[:2], targets)
    wanted = wanted + F.cross_entropy(logits[2:4], few.labels.repeat(2))
    torch.testing.assert_close(got, wanted)
    # With any threshold below the least possible confidence all of them count.
    torch.manual_seed(0)
    all_count = FixMatch(batch_size=2, threshold=0.0, answers=0.5, ratio=3, consistency=2.0)
    got = all_count.owning(few)._loss(task(clone))(clone, images, targets, 0.0)
    logits = seen[1][1]
    more = F.cross_entropy(logits[10:], logits[4:10].argmax(1))
    torch.testing.assert_close(got, wanted + 2 * more)


def test_rotations_with_labels_by_hand():
    clone, targets = still(), torch.zeros(2, 4)
    few = ImageSet(OWNED.images[:1], OWNED.labels[:1])
    settings = S4L(weight=0.0, labels=True, query_budget=490).owning(few)
    loss = settings._loss(task(clone))
    got = loss(clone, to_float(QUERIES[:2]), targets, 0.0)
    torch.testing.assert_close(got, F.cross_entropy(clone(to_float(few.images)), few.labels))
    seen = []
    clone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss(clone, to_float(QUERIES[:2]), targets, 0.0)
    assert len(seen[0]) == 4 * (2 + 2 + 2)
    assert torch.equal(seen[0][2:4], to_float(few.images).repeat(2, 1, 1, 1))


@pytest.mark.slow
@each
def test_labels_and_pictures_alone_teach(settings):
    """The control learns the task, from a query set of the victim's kind and without a query."""
    victim = Victim(MODEL, query_budget=0)
    longer = {"epochs": 6, "query_budget": 300, "batch_size": 16, "lr": 0.05}
    found = run(replace(settings, victim=False, **longer), victim)
    assert found.queries == victim.queries == 0
    assert [tuple(part.shape) for part in found.transfer_set] == [(0, 1, 8, 8), (0, 4)]
    assert right(found.clone) > 0.25 + 5 * (0.25 * 0.75 / 400) ** 0.5  # no chance


@each
def test_nothing_of_the_victim_is_in_the_control(settings):
    alone = replace(settings, victim=False)
    found, other = run(alone), run(alone, Victim(lambda images: MODEL(images).flip(1)))
    assert same_bits(found.clone, other.clone) and found.queries == 0
    assert not same_bits(found.clone, run(settings).clone)


@pytest.mark.slow
def test_answers_teach_what_few_labels_do_not():
    few = ImageSet(OWNED.images[:4], OWNED.labels[:4])
    settings = FixMatch(epochs=4, batch_size=16, query_budget=300, ratio=1, lr=0.05)
    asked, alone = (
        right(replace(settings, victim=asks).owning(few)(Victim(MODEL), QUERIES, CLONE).clone)
        for asks in (True, False)
    )
    assert asked > 0.7 > 0.5 > alone


@each
def test_queries_are_exact(settings):
    victim = Victim(MODEL, query_budget=100)
    found = run(settings, victim)
    assert found.queries == victim.queries == len(found.transfer_set[0]) == 100
    with pytest.raises(QueryBudgetExceeded, match="needs 100 queries, the victim allows 99"):
        run(settings, Victim(MODEL, query_budget=99))


@each
def test_same_seed_same_bits(settings):
    before = torch.get_rng_state()
    a, b, other = (run(replace(settings, seed=seed)).clone for seed in (0, 0, 1))
    assert same_bits(a, b) and not same_bits(a, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("asks", [True, False])
@each
def test_killed_run_goes_on_bit_identically(settings, asks, tmp_path, monkeypatch):
    settings = replace(settings, victim=asks)
    whole = run(settings).clone
    with monkeypatch.context() as patch:
        kill_at(patch, 2 if asks else 1.5)  # in the second epoch
        with pytest.raises(Killed):
            run(settings, resume_dir=tmp_path)
    resumed = run(settings, Victim(MODEL, query_budget=0), resume_dir=tmp_path)
    assert same_bits(whole, resumed.clone) and resumed.queries == (100 if asks else 0)


@each
def test_labeled_images_that_do_not_fit_cost_no_query(settings):
    victim = Victim(MODEL)
    wide = ImageSet(torch.zeros(3, 1, 8, 9, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"owning: wanted images of \[1, 8, 8\] .* \[1, 8, 9\]"):
        settings.owning(wide)(victim, QUERIES, CLONE)
    with pytest.raises(RuntimeError, match="needs labeled images: call"):
        settings(victim, QUERIES, CLONE)
    assert victim.queries == 0


@pytest.mark.parametrize("asks", [True, False])
@each
def test_settings_survive_yaml_and_bfloat16(settings, asks):
    changed = {**settings.to_dict(), "precision": "bfloat16", "victim": asks, "epochs": 1}
    clone = run(type(settings).from_dict(changed)).clone
    assert all(weight.isfinite().all() for weight in clone.parameters())
    assert next(clone.parameters()).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("asks", [True, False])
@each
def test_clone_trains_on_its_device(settings, asks):
    settings = replace(settings, victim=asks).owning(OWNED)
    found = settings(Victim(MODEL), QUERIES, copy.deepcopy(CLONE).cuda())
    assert all(state.is_cuda for state in found.clone.state_dict().values())


def test_arguments_are_checked():
    for argument in ({"threshold": 1.1}, {"ratio": 0}, {"consistency": -1.0}, {"answers": -1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(argument))}: wanted"):
            FixMatch(**argument)
    with pytest.raises(ConfigError, match=r"victim: wanted true, or labels=true, .*, got false"):
        S4L(victim=False)
    assert not S4L().owns and S4L(labels=True).owns and FixMatch().owns


def test_without_consistency_and_labels_it_still_asks_like_knockoff_nets():
    plain = KnockoffNets(**QUICK)(Victim(MODEL), QUERIES, CLONE)
    for part, other in zip(plain.transfer_set, run(ATTACKS[0]).transfer_set, strict=True):
        assert torch.equal(part, other)
