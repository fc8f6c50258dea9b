import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import QUERIES, toy_images

from divqat._util.settings import ConfigError
from divqat.data import ImageSet, to_float
from divqat.defenses import Owner
from divqat.defenses.modelguard import FLOOR, MARGIN, ModelGuardS, ModelGuardW
from divqat.victim import Victim

optimize = pytest.importorskip("scipy.optimize")  # scikit-learn brings it

IMAGES = torch.zeros(1, 1, 8, 8)  # neither of the two looks at them


def model(images):
    return 3 * images[:, 0, 0, :4]


OWNER = Owner(ImageSet(*toy_images(8, seed=1)), model, build=lambda: None)


@st.composite
def answers(draw, rows=(1, 20), classes=(1, 30)):
    """From nearly uniform to nearly one-hot, with ties and zeros."""
    n, k = draw(st.integers(*rows)), draw(st.integers(*classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(n, k, generator=generator) * draw(st.sampled_from([0.01, 1, 5, 30, 300]))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    return logits.softmax(1)


epsilons = st.sampled_from([0.0, 1e-3, 0.05, 0.3, 1.0, 1.7, 2.0])


def check_release(released, clean, epsilon, top1=True):
    assert released.shape == clean.shape and released.dtype == torch.float32
    assert (released >= 0).all()
    assert torch.allclose(released.sum(1), torch.ones(len(clean)), atol=1e-5)
    assert ((released - clean).abs().sum(1) <= epsilon + 1e-5).all()
    if top1:
        assert torch.equal(top(released), top(clean))


def top(rows):
    return rows.sort(dim=1, descending=True, stable=True).indices[:, 0]


def least(y, epsilon):
    """The least sum_k y'_k log y_k, from a solver; the variables are y' and z >= |y' - y|."""
    k, best, margin = len(y), y.argmax(), min(MARGIN, epsilon / 4)
    eye, zero = np.eye(k), np.zeros((k, k))
    behind = np.delete(eye - eye[best], best, 0)  # y'_j - y'_best <= -margin
    rows = [
        np.hstack([eye, -eye]),
        np.hstack([-eye, -eye]),
        np.hstack([behind, zero[1:]]),
        np.hstack([zero[:1], np.ones((1, k))]),
    ]
    result = optimize.linprog(
        np.concatenate([np.log(y + FLOOR), np.zeros(k)]),
        A_ub=np.vstack(rows),
        b_ub=np.concatenate([y, -y, np.full(k - 1, -margin), [epsilon]]),
        A_eq=np.hstack([np.ones((1, k)), zero[:1]]),
        b_eq=[1.0],
    )
    assert result.success, result.message
    return result.fun


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(answers(), epsilons)
def test_released_answers_are_near_and_keep_the_top_class(probs, epsilon):
    check_release(ModelGuardW(epsilon=epsilon)(probs, IMAGES), probs, epsilon, top1=epsilon > 0)
    check_release(ModelGuardS(epsilon=epsilon)(probs, IMAGES), probs, epsilon)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(answers(rows=(3, 3), classes=(2, 8)), epsilons.filter(bool))
def test_w_is_as_good_as_a_linear_program_solver(probs, epsilon):
    released = ModelGuardW(epsilon=epsilon)(probs, IMAGES).double()
    for y, found in zip(probs.double().numpy(), released.numpy(), strict=True):
        y = y / y.sum()
        assert found @ np.log(y + FLOOR) == pytest.approx(least(y, epsilon), abs=1e-5)


@pytest.mark.parametrize(
    ("clean", "epsilon", "wanted"),
    [
        # half of epsilon goes from the top class to the least likely one
        ([0.7, 0.2, 0.1], 0.2, [0.6, 0.2, 0.2]),
        # the second class rather gives it than the first, when the last would overtake the first
        ([0.6, 0.3, 0.1], 2.0, [0.5, 0.0, 0.5]),
        # the top class grows, so that the last one may grow as well
        ([0.35, 0.33, 0.32, 0.0], 2.0, [0.5, 0.0, 0.0, 0.5]),
        ([1.0, 0.0, 0.0], 0.0, [1.0, 0.0, 0.0]),
    ],
)
def test_w_by_hand(clean, epsilon, wanted):
    released = ModelGuardW(epsilon=epsilon)(torch.tensor([clean]), IMAGES)
    assert torch.allclose(released, torch.tensor([wanted]), atol=2 * MARGIN)


def test_s_by_hand():
    a, near_a = [0.8, 0.2, 0.0], [0.7, 0.3, 0.0]  # 0.2 apart
    b = [0.5, 0.3, 0.2]  # 0.6 from a, 0.4 from near_a
    other = [0.2, 0.8, 0.0]  # another top class
    probs = torch.tensor([a, other, near_a, b, near_a])
    wanted = torch.tensor([a, other, a, b, a])
    assert torch.equal(ModelGuardS(epsilon=0.45)(probs, IMAGES), wanted)
    # b comes first here: near_a is near to it, and a is not
    wanted = torch.tensor([b, b, other, a])
    assert torch.equal(ModelGuardS(epsilon=0.45)(probs[[3, 2, 1, 0]], IMAGES), wanted)


@settings(max_examples=40, deadline=None)
@given(answers(rows=(1, 60), classes=(2, 5)), epsilons, st.data())
def test_s_is_the_loop_over_single_answers(probs, epsilon, data):
    defense, memory = ModelGuardS(epsilon=epsilon), []
    wanted = []
    for row in probs:
        near = [c for c in memory if c.argmax() == row.argmax() and dist(c, row) <= epsilon]
        memory += [] if near else [row]
        wanted.append((near or [row])[0])
    cut = data.draw(st.integers(0, len(probs)))
    released = torch.cat([defense(part, IMAGES) for part in (probs[:cut], probs[cut:])])
    assert torch.equal(released, torch.stack(wanted))
    assert len(released.unique(dim=0)) == len(torch.stack(memory).unique(dim=0))
    assert torch.equal(defense(probs.flip(0), IMAGES), released.flip(0))  # asked again


def dist(a, b):
    return torch.cdist(a[None], b[None], p=1)


def test_s_starts_afresh_when_fitted():
    first, second = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.7, 0.3]])
    used = ModelGuardS(epsilon=0.5)
    assert torch.equal(used(first, IMAGES), first)
    assert torch.equal(used(second, IMAGES), first)
    fresh = used.fit(OWNER)
    assert fresh == used
    assert torch.equal(fresh(second, IMAGES), second)
    assert torch.equal(used(second, IMAGES), first)


def test_victim_wears_them():
    images = to_float(QUERIES)
    clean = Victim(model)(images)
    for kind, most in ((ModelGuardW, 500), (ModelGuardS, 60)):
        victim = Victim(model, defense=kind(epsilon=0.5).fit(OWNER), batch_size=64)
        shown = victim(images)
        check_release(shown, clean, 0.5)
        assert (shown - clean).abs().sum(1).mean() > 0.2
        assert len(shown.unique(dim=0)) <= most
        assert torch.equal(victim(images), shown)
        assert victim.defense == f"{kind.__name__}(epsilon=0.5)"


@pytest.mark.parametrize("kind", [ModelGuardW, ModelGuardS])
@pytest.mark.parametrize("epsilon", [-0.1, 2.1, "much"])
def test_refuses_bad_settings(kind, epsilon):
    with pytest.raises(ConfigError, match="epsilon: wanted a number at least 0 at most 2, got"):
        kind(epsilon=epsilon)
