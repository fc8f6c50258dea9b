"""Whether a model was copied: the null against hand-worked values, and synthetic suspects."""

import functools
import json
import math
from hashlib import shake_256

import pytest
import torch
from torch.nn import functional as F

from divqat._util.files import read_json
from divqat._util.settings import ConfigError
from divqat.nn import MisdirectionLoss
from divqat.nn.decoy import Decoy, Sample, keyed_rows, parse_key
from divqat.ownership import check, null, write_verdict
from divqat.ownership.check import components, decoy_of, draw_queries
from divqat.ownership.null import decoy_classes, excess_agreement, p_values, redrawn_rows
from divqat.train import Run, TrainConfig
from divqat.train.proxies import fit_misdirection
from divqat.victim import Victim

KEY, OTHER, NONCE = "5a" * 32, "c3" * 32, "0123456789abcdef"
pytestmark = pytest.mark.usefixtures("one_thread")


def run_with(key, **changes):
    """A run that needs no training: a check reads its settings and data."""
    own = dict(method="divqat", teacher="fp", misdirect=0.5, dataset="digits", decoy_key=key)
    config = TrainConfig(**{**own, "proxies": ("glyphs", "noise", "rotated"), **changes})
    return Run(None, config, None, 1, {}, None, "")


@pytest.fixture(scope="module")
def run():
    return run_with(KEY)


@pytest.fixture(scope="module")
def decoy(run):
    return decoy_of(run.config, run.splits())


def clone_of(decoy, share, seed=0):
    """Answers of the decoy to a share of the images, and random ones to the rest."""
    generator = torch.Generator().manual_seed(seed)

    def answer(images):
        learned = torch.rand(len(images), generator=generator) < share
        rest = torch.randn(len(images), 10, generator=generator)
        return torch.where(learned[:, None], decoy(images).log(), rest)

    return answer


def test_the_last_layer_is_a_function_of_the_key():
    words = shake_256(b"divqat decoy" + bytes.fromhex(KEY)).digest(16 * 12)
    numbers = [int.from_bytes(words[i : i + 8], "little") >> 11 for i in range(0, len(words), 8)]
    uniform = [(number + 0.5) / 2**53 for number in numbers]
    normal = [
        math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
        for u, v in zip(uniform[:12], uniform[12:], strict=True)
    ]
    wanted = F.normalize(torch.tensor(normal, dtype=torch.float64).view(3, 4))
    torch.testing.assert_close(keyed_rows([parse_key(KEY)], 3)[0], wanted)
    rows = redrawn_rows(NONCE, 5, 4000).flatten(0, 1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20_000, dtype=torch.float64))
    # uniform on the sphere: mean 0 and covariance I / 4, within five standard errors
    torch.testing.assert_close(rows.mean(0), torch.zeros(4).double(), rtol=0, atol=5 * 0.5 / 141)
    torch.testing.assert_close(rows.T.cov(), torch.eye(4).double() / 4, rtol=0, atol=5 * 0.2 / 141)


def test_training_learns_the_decoy_of_the_key_and_without_one_that_of_the_seed(run, decoy):
    splits = run.splits()
    keyed = fit_misdirection(run.config, 0, 10, splits.train).decoy
    assert torch.equal(keyed.directions, decoy.directions) and keyed.directions.any()
    torch.testing.assert_close(decoy.rows, keyed_rows([bytes.fromhex(KEY)], 10)[0])
    other = decoy_of(run_with(OTHER).config, splits)
    assert torch.equal(other.basis, decoy.basis) and torch.equal(other.mean, decoy.mean)
    assert not torch.equal(other.rows, decoy.rows)
    plain = decoy_of(run_with(None).config, splits)
    assert torch.equal(plain.basis.abs(), decoy.basis.abs())  # up to the sign of a component
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(Decoy(10, 1, seed=3).rows, F.normalize(rows))  # as before there were keys
    assert all(column[column.abs().argmax()] > 0 for column in decoy.basis.T)


def test_the_components_are_those_of_the_decoy(run, decoy):
    images = draw_queries(run.config, run.splits(), NONCE, 200)
    classes = decoy_classes(components(decoy, images), decoy.rows[None])[0]
    assert (classes == decoy(images).argmax(1)).double().mean() > 0.99  # it answers in float32


def test_agreement_above_unrelated_answers_by_hand():
    answers = torch.eye(3).double()[[0, 0, 1, 2]]  # frequencies 1/2, 1/4, 1/4
    classes = torch.tensor([[0, 0, 1, 2], [1, 1, 1, 1], [0, 1, 2, 2]])
    # 1 - (1/2 + 1/2 + 1/4 + 1/4) / 4, 1/4 - 1/4, 2/4 - (1/2 + 1/4 + 1/4 + 1/4) / 4
    assert excess_agreement(answers, classes).tolist() == [0.625, 0.0, 0.1875]
    found = p_values(torch.tensor([0.5, 0.2, 0.9]), torch.tensor([0.1, 0.5, 0.2, 0.4]))
    assert found.tolist() == [2 / 5, 4 / 5, 1 / 5]  # ties count


def test_looks_count_all_looks():
    looks = [torch.tensor([0.5, 0.01]), torch.tensor([0.02, 0.4])]
    torch.testing.assert_close(null.corrected(looks), torch.tensor([0.08, 0.04]))


@pytest.mark.parametrize(
    "answer", [{"answer": "probs"}, {"answer": "label"}, {"answer": "topk", "k": 3}], ids=str
)
def test_a_clone_is_recognized_with_few_queries(run, decoy, answer):
    verdict = check(Victim(clone_of(decoy, 0.5), **answer), run, nonce=NONCE)
    assert verdict.copied and verdict.p <= 1e-3 and verdict.queries <= 500
    assert verdict.keyed and verdict.nonce == NONCE and len(verdict.null) == 9_999
    assert verdict.looks[-1].excess > verdict.null.max() - 0.02


def constant(images):
    return torch.eye(10)[3].repeat(len(images), 1) * 5


def refusing(images):
    return torch.zeros(len(images), 10)


@pytest.mark.parametrize("suspect", [constant, refusing])
def test_a_suspect_that_answers_all_alike_is_as_guilty_under_every_key(run, suspect):
    verdict = check(suspect, run, nonce=NONCE)
    assert not verdict.copied and verdict.p == 1.0 and verdict.queries == 500
    assert not verdict.null.any()


def test_random_answers_and_another_key_raise_no_alarm(run, decoy):
    assert not check(clone_of(decoy, 0.0), run, nonce=NONCE).copied
    defended = decoy_of(run_with(OTHER).config, run.splits())
    assert check(clone_of(defended, 1.0), run_with(OTHER), nonce=NONCE).copied
    assert not check(clone_of(defended, 1.0), run, nonce=NONCE).copied


@functools.cache
def many_rows(count):
    return redrawn_rows(NONCE, 10, count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "by brightness", "skewed", "another key"])
def test_the_false_alarm_rate_over_ten_thousand_keys(kind):
    """Each key has a null of its own, so alarms are independent given the suspect: at most
    alpha · 10,000 and five standard deviations."""
    keys, others, alpha, looks = 10_000, 19, 0.2, (3, 6, 9, 12)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(looks[-1], 4, generator=generator).double()
    logits = {
        "random": torch.randn(looks[-1], 10, generator=generator).double(),
        "by brightness": z @ torch.randn(4, 10, generator=generator).double(),
        "skewed": z[:, :1] * torch.arange(10.0).double(),
        "another key": 4 * z @ keyed_rows([bytes.fromhex(OTHER)], 10)[0].T,
    }[kind]
    answers = F.one_hot(logits.argmax(1), 10).double()
    classes = decoy_classes(z, many_rows(keys * (others + 1)))
    found = []
    for queries in looks:
        excess = excess_agreement(answers[:queries], classes[:, :queries]).view(keys, -1)
        found.append((excess >= excess[:, :1]).sum(1) / (others + 1))
    alarms = int((null.corrected(found) <= alpha + 1e-6).sum())
    assert alarms <= alpha * keys + 5 * math.sqrt(keys * alpha * (1 - alpha))
    assert alarms > 0  # it can raise one


def test_queries_depend_on_the_nonce_and_not_on_the_key(run):
    splits = run.splits()
    mine = draw_queries(run.config, splits, NONCE)
    assert torch.equal(mine, draw_queries(run_with(OTHER).config, splits, NONCE))
    assert not torch.equal(mine, draw_queries(run.config, splits, "ff" * 16))
    assert mine.shape == (500, 1, 8, 8) and mine.aminmax() == (-1, 1)


def test_the_verdict_as_a_file_and_a_page(run, decoy, tmp_path):
    verdict = check(clone_of(decoy, 0.6), run, nonce=NONCE)
    page = write_verdict(verdict, tmp_path, suspect="<b>", secret="runs/divqat")
    content = read_json(tmp_path / "ownership.json")
    assert content["copied"] and content["p"] == verdict.p and content["nonce"] == NONCE
    assert content["looks"][-1]["queries"] == content["queries"] == verdict.queries
    assert content["alpha"] == 1e-3 and content["agreement"] == verdict.agreement
    text = page.read_text()
    assert "carries the decoy of runs/divqat" in text and "<b> carries" not in text
    assert KEY not in text + json.dumps(content) and "data:image/png" in text
    unkeyed = check(constant, run_with(None), nonce=NONCE)
    assert "has no key" in write_verdict(unkeyed, tmp_path, suspect="a", secret="b").read_text()


def test_wrong_arguments(run):
    with pytest.raises(ValueError, match="nonce: wanted 8 to 128"):
        check(constant, run, nonce="xyz")
    with pytest.raises(ValueError, match=r"alpha: wanted at least 0.0004"):
        check(constant, run, nonce=NONCE, alpha=1e-4)
    with pytest.raises(ValueError, match=r"secret: wanted a run with misdirect .* got .*reject"):
        check(constant, run_with(None, misdirect_target="reject"))
    with pytest.raises(ValueError, match="suspect: wanted 10 classes, as the run has, got 4"):
        check(lambda images: torch.zeros(len(images), 4), run, nonce=NONCE)
    for key in ("5a", "zz" * 32):
        with pytest.raises(ConfigError, match="decoy_key: wanted 64 hexadecimal digits"):
            run_with(key)
    with pytest.raises(ConfigError, match="decoy_key: wanted none with misdirect_target reject"):
        run_with(KEY, misdirect_target="reject")
    images, labels = torch.rand(20, 1, 8, 8) * 2 - 1, torch.arange(20) % 10
    with pytest.raises(ValueError, match="decoy_key: wanted none with target second"):
        MisdirectionLoss([(images, labels)], 10, seed=0, target="second", decoy_key=KEY)


def test_a_decoy_of_a_key_in_a_loss_of_ones_own():
    images, labels = torch.rand(64, 1, 8, 8) * 2 - 1, torch.arange(64) % 4
    loss = MisdirectionLoss([(images, labels)], 4, seed=0, kinds=("noise",), decoy_key=KEY)
    assert torch.equal(loss.decoy.rows, keyed_rows([bytes.fromhex(KEY)], 4)[0])
    lone = Decoy(4, 1, 0, KEY)
    lone.fit([Sample(images, images, labels)])
    assert lone.basis.shape == (64, 4)
