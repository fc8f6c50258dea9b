import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import CLASSES, QUERIES, same_bits, toy_images, toy_model, toy_victim

from divqat._util.settings import ConfigError
from divqat.data import ImageSet, to_float
from divqat.defenses import Owner
from divqat.defenses.grad2 import GRAD2, all_ones_scores, min_ip_scores, redirect
from divqat.defenses.mad import MAD
from divqat.metrics import fidelity, predict
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = to_float(QUERIES[:40])
VICTIM = toy_model(seed=5).eval()


def build(classes=CLASSES):
    """A network whose weights follow from torch's global generator."""
    return toy_model(seed=int(torch.randint(2**31, ())), classes=classes)


def owner(classes=CLASSES, seed=0, model=VICTIM):
    train = ImageSet(*toy_images(400, seed=1))
    return Owner(train, model, build=lambda: build(classes), seed=seed)


MADS = {
    (classes, keep): MAD(argmax_preserving=keep).fit(owner(classes))
    for classes, keep in itertools.product((2, CLASSES, 12), (False, True))
}


def with_epsilon(defense, epsilon):
    changed = copy.deepcopy(defense)
    object.__setattr__(changed, "epsilon", epsilon)
    return changed


def answers(n, classes, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, classes, generator=generator)).softmax(1)


def gradients(network, image, parameters):
    """G, [num_classes, number of parameters], class by class."""
    log_probs = network(image[None]).log_softmax(1)[0]
    rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in log_probs]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def trainable(network):
    """A copy with the same weights that autograd may differentiate."""
    return copy.deepcopy(network).requires_grad_(True)


def deviation(answer, y, g):
    u, v = g.T @ answer, g.T @ y
    return float((u / u.norm() - v / v.norm()).square().sum())


def vertices(y, keep):
    eye = torch.eye(len(y))
    if not keep:
        return eye
    top = y.argmax()
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(y))))
    sets = sets[sets[:, top] > 0] + 1e-5 * eye[top]
    return sets / sets.sum(1, keepdim=True)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.0])
def test_mad_is_the_search_with_gradients_from_autograd(keep, epsilon):
    defense = with_epsilon(MADS[CLASSES, keep], epsilon)
    probs = answers(len(IMAGES), CLASSES, seed=0)
    released = defense(probs, IMAGES)
    network = trainable(defense._surrogate)
    for y, image, answer in zip(probs, IMAGES, released, strict=True):
        g = gradients(network, image, [network[-1].weight])
        best = max(vertices(y, keep), key=lambda vertex: deviation(vertex, y, g))
        share = min(1.0, epsilon / float((best - y).abs().sum()))
        assert torch.allclose(answer, (1 - share) * y + share * best, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_mad_turns_the_gradient_further_the_more_it_may(keep):
    probs = answers(len(IMAGES), CLASSES, seed=1)
    network = trainable(MADS[CLASSES, keep]._surrogate)
    before = torch.zeros(len(IMAGES))
    for epsilon in (0.2, 0.6, 1.2):
        released = with_epsilon(MADS[CLASSES, keep], epsilon)(probs, IMAGES)
        after = torch.tensor(
            [
                deviation(answer, y, gradients(network, image, [network[-1].weight]))
                for answer, y, image in zip(released, probs, IMAGES, strict=True)
            ]
        )
        assert (after >= before - 1e-5).all() and after.mean() > before.mean()
        before = after


def test_greedy_vertices_are_nearly_as_good_as_the_best_ones(monkeypatch):
    defense = with_epsilon(MADS[CLASSES, True], 2.0)  # the released answers are the vertices
    probs = answers(len(IMAGES), CLASSES, seed=2, scale=1.0)
    best = defense(probs, IMAGES)
    monkeypatch.setattr("divqat.defenses.mad.MOST_ENUMERATED", 1)
    greedy = defense(probs, IMAGES)
    p = defense._surrogate(IMAGES).softmax(1)
    cosines = [torch.cosine_similarity(each - p, probs - p) for each in (best, greedy)]
    assert (cosines[1] >= cosines[0] - 1e-4).all()
    assert ((cosines[1] - cosines[0]) < 1e-4).float().mean() > 0.8
    assert torch.equal(greedy.argmax(1), probs.argmax(1))


@st.composite
def clean_answers(draw):
    """Up to len(IMAGES) of them, from nearly uniform to one-hot, with ties."""
    classes = draw(st.sampled_from([2, CLASSES, 12]))
    scale = draw(st.sampled_from([0.01, 1, 5, 30, 300]))
    n, seed = draw(st.integers(1, len(IMAGES))), draw(st.integers(0, 2**32))
    probs = answers(n, classes, seed, scale)
    ties = (probs.log().round() if draw(st.booleans()) else probs.log()).clamp(min=-200)
    return ties.softmax(1)


@settings(max_examples=80, deadline=None)
@given(clean_answers(), st.sampled_from([0.05, 0.3, 1.0, 1.7, 2.0]), st.booleans())
def test_mad_stays_in_the_simplex_and_the_ball(probs, epsilon, keep):
    defense = with_epsilon(MADS[probs.shape[1], keep], epsilon)
    assert defense.keeps_top1 is keep
    released = defense(probs, IMAGES[: len(probs)])
    check_release(released, probs, epsilon)
    if keep:
        assert torch.equal(top(released), top(probs))


def check_release(released, clean, epsilon):
    assert released.shape == clean.shape and released.dtype == torch.float32
    assert (released >= 0).all()
    assert torch.allclose(released.sum(1), torch.ones(len(clean)), atol=1e-5)
    assert ((released - clean).abs().sum(1) <= epsilon + 1e-5).all()


def top(rows):
    return rows.sort(dim=1, descending=True, stable=True).indices[:, 0]


def test_grad2_scores_are_those_of_autograd():
    network = VICTIM
    probs = answers(6, CLASSES, seed=3)
    ones, min_ip = all_ones_scores(network, IMAGES[:6]), min_ip_scores(network, IMAGES[:6], probs)
    for image, y, row, other in zip(IMAGES, probs, ones, min_ip, strict=False):
        g = gradients(network, image, list(network.parameters()))
        assert torch.allclose(row, g.sum(1), rtol=1e-3, atol=1e-2)
        assert torch.allclose(
            other, -g @ (g.T @ y), rtol=1e-3, atol=1e-3 * float(other.abs().max())
        )


@pytest.mark.parametrize(
    ("clean", "scores", "epsilon", "wanted"),
    [
        ([0.7, 0.2, 0.1], [1.0, 2.0, 3.0], 0.4, [0.5, 0.2, 0.3]),
        # the worst class has less than is moved: the next one gives the rest
        ([0.7, 0.2, 0.1], [2.0, 3.0, 1.0], 0.6, [0.5, 0.5, 0.0]),
        # the best class takes all that there is
        ([0.7, 0.2, 0.1], [3.0, 2.0, 1.0], 2.0, [1.0, 0.0, 0.0]),
        ([0.7, 0.2, 0.1], [1.0, 2.0, 3.0], 0.0, [0.7, 0.2, 0.1]),
    ],
)
def test_redirection_by_hand(clean, scores, epsilon, wanted):
    found = redirect(torch.tensor([clean]), torch.tensor([scores]), epsilon)
    assert torch.allclose(found, torch.tensor([wanted]))


@settings(max_examples=40, deadline=None)
@given(clean_answers(), st.sampled_from([0.05, 0.3, 1.0, 1.7, 2.0]))
def test_redirection_is_as_good_as_a_linear_program_solver(probs, epsilon):
    optimize = pytest.importorskip("scipy.optimize")  # scikit-learn brings it
    probs = probs[:3].double()
    probs = probs / probs.sum(1, keepdim=True)
    scores = torch.randn(probs.shape, generator=torch.Generator().manual_seed(0)).double()
    released = redirect(probs, scores, epsilon)
    check_release(released.float(), probs.float(), epsilon)
    for y, c, found in zip(probs.numpy(), scores.numpy(), released.numpy(), strict=True):
        # the variables are what goes up and what goes down
        eye = np.eye(len(y))
        result = optimize.linprog(
            np.concatenate([-c, c]),
            A_ub=np.vstack([np.hstack([-eye, eye]), np.ones((1, 2 * len(y)))]),
            b_ub=np.concatenate([y, [epsilon]]),
            A_eq=np.concatenate([np.ones(len(y)), -np.ones(len(y))])[None],
            b_eq=[0.0],
        )
        assert result.success
        assert c @ (found - y) == pytest.approx(-result.fun, abs=1e-6)


@pytest.mark.parametrize("direction", ["all-ones", "min-ip"])
def test_grad2_turns_the_gradient_of_its_surrogate(direction):
    defense = GRAD2(epochs=2, direction=direction, epsilon=0.5).fit(owner())
    probs = answers(len(IMAGES), CLASSES, seed=4)
    released = defense(probs, IMAGES)
    check_release(released, probs, 0.5)
    assert not torch.equal(released.argmax(1), probs.argmax(1)) and not defense.keeps_top1
    network = trainable(defense._surrogate)
    for y, answer, image in zip(probs, released, IMAGES, strict=True):
        g = gradients(network, image, list(network.parameters()))
        z = torch.ones(g.shape[1]) if direction == "all-ones" else -g.T @ y
        assert (g.T @ answer) @ z > (g.T @ y) @ z


def test_surrogate_of_grad2_learns_the_victim_and_that_of_mad_nothing():
    of_model = owner(model=toy_victim())
    clean = predict(of_model.model, QUERIES)
    for defense, least, most in ((GRAD2(epochs=5), 0.9, 1.0), (MAD(), 0.0, 0.7)):
        surrogate = defense.fit(of_model)._surrogate
        assert least <= fidelity(predict(surrogate, QUERIES), clean) <= most


@pytest.mark.parametrize("defense", [MAD(), GRAD2(epochs=1)])
def test_surrogate_follows_from_the_seed_and_is_not_the_clone_of_that_seed(defense):
    before = torch.get_rng_state()
    first, same, other = (defense.fit(owner(seed=seed))._surrogate for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(first, same) and not same_bits(first, other)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        assert not same_bits(MADS[CLASSES, False]._surrogate, build().eval())
    assert defense._surrogate is None


@pytest.mark.parametrize("kind", [MAD(), MAD(argmax_preserving=True), GRAD2(epochs=1)])
def test_victim_wears_them(kind):
    defense = kind.fit(owner())
    clean = Victim(VICTIM)(IMAGES)
    shown = Victim(VICTIM, defense=defense)(IMAGES)
    check_release(shown, clean, 1.0)
    assert (shown - clean).abs().sum(1).mean() > 0.3
    victim = Victim(VICTIM, defense=defense, batch_size=7)  # of no matter
    assert torch.allclose(victim(IMAGES), shown, atol=1e-5)
    assert victim.defense == str(kind)


@pytest.mark.parametrize("kind", [MAD, GRAD2])
def test_has_to_be_fitted(kind):
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}: call fit\(owner\) first"):
        kind()(answers(2, CLASSES, seed=0), IMAGES[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAD(epsilon=-1), "epsilon: wanted a number at least 0 at most 2, got -1"),
        (lambda: GRAD2(epsilon=3), "epsilon: wanted a number at least 0 at most 2, got 3"),
        (lambda: GRAD2(epochs=0), "epochs: wanted a whole number at least 1, got 0"),
        (lambda: GRAD2(direction="up"), "direction: wanted one of all-ones, min-ip, got 'up'"),
    ],
)
def test_refuses_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
