"""Query sets: their text, their images and their number."""

import pytest
import torch
from PIL import Image
from toys import toy_model, toy_splits, toy_victim

from divqat._util.settings import ConfigError
from divqat.attacks import KnockoffNets
from divqat.attacks.query_set import Part, load_query_set, parse_query_set
from divqat.data import transfer_set
from divqat.evaluate import Grid, Subject, evaluate
from divqat.evaluate.subject import image_keys
from divqat.experiments.deploy import AttackConfig
from divqat.experiments.study import Study
from divqat.victim import Victim

SPLITS = toy_splits()
OWN = set(image_keys(SPLITS.validation.images))


def loaded(text, limit=None, root=None):
    """How many images are the victim's own kind, and how many there are."""
    keys = image_keys(load_query_set(text, SPLITS, root, limit))
    return sum(key in OWN for key in keys), len(keys)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("photos", (Part("photos", None),)),
        ("own:150", (Part("own", 150),)),
        ("own:1500+openclipart", (Part("own", 1500), Part("openclipart", None))),
        ("noise:3+own:4+icons:5", (Part("noise", 3), Part("own", 4), Part("icons", 5))),
    ],
)
def test_texts(text, wanted):
    assert parse_query_set(text) == wanted
    assert Grid(query_set=text).query_set == AttackConfig(query_set=text).query_set == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pictures", r"query_set: wanted one of openclipart, .*, own, .*, got 'pictures'$"),
        ("own+pictures", r"query_set: wanted one of .*, got 'pictures' in 'own\+pictures'$"),
        ("own+", r"query_set: wanted one of .*, got '' in 'own\+'$"),
        ("own:0", "query_set: wanted own:COUNT with a whole number above 0, got 'own:0'"),
        ("own:", "query_set: wanted own:COUNT .*, got 'own:'"),
        ("own:1.5", "query_set: wanted own:COUNT .*, got 'own:1.5'"),
        ("noise+own:-3", "query_set: wanted own:COUNT .*, got 'own:-3'"),
        ("own:²", "query_set: wanted own:COUNT .*, got 'own:²'"),
        ("own:10+noise+own", r"query_set: wanted each source once, got 'own:10\+noise\+own'"),
    ],
)
def test_texts_that_are_none(text, message):
    for make in (lambda: Grid(query_set=text), lambda: AttackConfig(query_set=text),
                 lambda: Study.from_dict({"seeds": [0], "common": {"dataset": "digits"},
                                          "victims": {"qat": {"method": "qat"}},
                                          "evaluate": {"query_set": text}})):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make()


@pytest.mark.parametrize(
    ("text", "limit", "wanted"),
    [
        ("own", None, (100, 100)),
        ("own", 30, (30, 30)),
        ("own", 300, (100, 100)),
        ("own:100", None, (100, 100)),
        ("own:40", 100, (40, 40)),
        ("own:40+noise:7", None, (40, 47)),
        ("own:40+noise:7", 47, (40, 47)),
        ("own:40+noise", 100, (40, 100)),
        ("noise+own:40", 41, (40, 41)),
        ("own+noise", 7, (4, 7)),  # what does not divide goes to the first ones
    ],
)
def test_counts_are_exact(text, limit, wanted):
    assert loaded(text, limit) == wanted


@pytest.mark.parametrize(
    ("text", "limit", "message"),
    [
        ("own:101", None, "wanted at most 100 own images, the validation split of toys, got own:1"),
        ("noise:5+own:101", None, "wanted at most 100 own images, .* got own:101"),
        ("own:40+noise:7", 46, r"wanted at most 46 images, the limit, got 'own:.*7' with 47$"),
        ("own:40+noise", 40, r"wanted at most 40 images, .* got .* with 40 and more$"),
        ("own+noise", 1, r"wanted at most 1 images, .* with 0 and more$"),
    ],
)
def test_counts_that_cannot_be(text, limit, message):
    with pytest.raises(ConfigError, match=f"query_set: {message}"):
        loaded(text, limit)


def test_more_own_images_contain_the_fewer_and_have_every_class():
    few, more = (load_query_set(f"own:{n}", SPLITS, None, None) for n in (20, 60))
    assert torch.equal(more[:20], few)
    assert torch.equal(load_query_set("own", SPLITS, None, 20), few)
    rows = [image_keys(SPLITS.validation.images).index(key) for key in image_keys(more)]
    assert len(set(rows)) == 60 and rows != sorted(rows)
    assert len(SPLITS.validation.labels[rows].unique()) == 4


def test_a_mixture_is_mixed():
    """A defense is adjusted on the first queries, which stand for all."""
    mixed = load_query_set("own:50+noise:50", SPLITS, None, None)
    owned = [key in OWN for key in image_keys(mixed)]
    assert 0 < sum(owned[:20]) < 20
    again = load_query_set("own:50+noise:50", SPLITS, None, None)
    assert torch.equal(mixed, again)
    noise = image_keys(transfer_set("noise", channels=1, image_size=8, limit=50))
    assert set(image_keys(mixed)) - OWN == set(noise)


def test_one_root_is_that_of_the_folder(tmp_path):
    for shade in (10, 200):
        Image.new("L", (8, 8), shade).save(tmp_path / f"{shade}.png")
    found = load_query_set("folder+photos:3", SPLITS, str(tmp_path), None)
    flat = found.flatten(1)
    assert len(found) == 5 and int((flat == flat[:, :1]).all(1).sum()) == 2
    assert AttackConfig(query_set="own:3+folder", query_root="a").places == {"device"}


def test_the_budget_counts_every_image_of_a_mixture_once():
    queries = load_query_set("own:30+noise:20", SPLITS, None, None)
    victim = Victim(toy_victim(), query_budget=50)
    found = KnockoffNets(epochs=1)(victim, queries, toy_model(seed=1))
    assert victim.queries == found.queries == 50
    assert sorted(image_keys(found.transfer_set[0])) == sorted(image_keys(queries))


@pytest.mark.slow
def test_an_evaluation_of_a_mixture(tmp_path):
    grid = Grid(
        attacks=("knockoff",), query_set="own:30+noise", query_limit=50, clones=("lenet",),
        epochs=1, seeds=1, epsilons=(), budgets=(40, 50), threads=1,
    )  # fmt: skip
    subject = Subject("a", toy_victim(), "qat")
    result = evaluate([subject], SPLITS, grid, tmp_path, log=lambda _: 0)
    assert result.query_images == 50 and [cell.queries for cell in result.cells] == [40, 50]
    assert "own:30+noise, 50 images" in (tmp_path / "report.md").read_text().replace("\\", "")
    too_many = Grid.from_dict({**grid.to_dict(), "query_set": "own:101"})
    with pytest.raises(ConfigError, match="query_set: wanted at most 50 images, the limit"):
        evaluate([subject], SPLITS, too_many, tmp_path / "other", log=lambda _: 0)
    assert not (tmp_path / "other").exists()
