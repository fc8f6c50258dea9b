import math

import pytest
import torch
from toys import QUERIES, same_bits, toy_model, toy_victim

from divqat.attacks import KnockoffNets
from divqat.attacks.smoothing import Smoothing
from divqat.data import to_float
from divqat.victim import Victim

QUICK = {"epochs": 1, "batch_size": 32}


@pytest.fixture(scope="module")
def model():
    return toy_victim()


def one_draw(monkeypatch, turn=0.0, right=0.0, down=0.0, mirrored=False):
    """Let every draw be this one: turns and shifts as shares of the largest."""
    first = torch.tensor([[turn], [right], [down]]) / 2 + 0.5
    draws = {2: first, 1: torch.tensor([0.0 if mirrored else 0.9])}
    monkeypatch.setattr(torch, "rand", lambda *size: draws[len(size)])


def test_one_copy_is_knockoff_nets(model):
    one = Smoothing(copies=1, **QUICK)(Victim(model), QUERIES, toy_model(seed=1))
    plain = KnockoffNets(**QUICK)(Victim(model), QUERIES, toy_model(seed=1))
    assert same_bits(one.clone, plain.clone)


def test_clone_learns_the_image_itself_and_the_mean_answer():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    answers = torch.tensor([[[1.0, 0], [0, 1]], [[0.5, 0.5], [0, 1]]])  # [copies, images, classes]
    got, targets = Smoothing(copies=2)._targets(None, images, answers.flatten(0, 1))
    assert torch.equal(got, images[:2])
    torch.testing.assert_close(targets, torch.tensor([[0.75, 0.25], [0, 1]]))


def test_first_copy_is_the_image_and_the_others_differ(model):
    extraction = Smoothing(query_budget=61, **QUICK)(Victim(model), QUERIES, toy_model())
    first, second, third = extraction.transfer_set[0].view(3, 20, 1, 8, 8)
    assert {x.numpy().tobytes() for x in first} <= {x.numpy().tobytes() for x in QUERIES}
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))


def test_no_change_allowed_is_no_change():
    unchanged = Smoothing(shift=0, angle=0, mirror=False)
    assert torch.equal(unchanged._augment(QUERIES), QUERIES)


def test_mirrored(monkeypatch):
    one_draw(monkeypatch, mirrored=True)
    picture = QUERIES[:1, :, :6]  # 6 rows, 8 columns
    assert torch.equal(Smoothing()._augment(picture), picture.flip(3))
    assert torch.equal(Smoothing(mirror=False)._augment(picture), picture)


def test_shifted_by_whole_pixels(monkeypatch):
    one_draw(monkeypatch, right=1.0, down=-1.0)
    picture = torch.randint(256, (1, 3, 8, 16), dtype=torch.uint8)
    wanted = torch.zeros_like(picture)  # 1/8 of the height and of the width; black comes in
    wanted[:, :, 1:, :-2] = picture[:, :, :-1, 2:]
    assert torch.equal(Smoothing(shift=0.125)._augment(picture), wanted)


@pytest.mark.parametrize("angle", [90.0, 180.0])
def test_turned(monkeypatch, angle):
    one_draw(monkeypatch, turn=1.0)
    picture = torch.randint(256, (1, 2, 8, 8), dtype=torch.uint8)
    turns = round(angle / 90)
    assert torch.equal(Smoothing(angle=angle)._augment(picture), picture.rot90(turns, (2, 3)))


def test_turning_keeps_lengths_in_a_wide_picture(monkeypatch):
    one_draw(monkeypatch, turn=1.0)
    picture = torch.zeros(1, 1, 40, 80, dtype=torch.uint8)
    picture[:, :, 17:23, 48:54] = 255  # its middle is 11 pixels right of the picture's
    turned = Smoothing(angle=60.0)._augment(picture)[0, 0].float()
    y = (turned.sum(1) * (torch.arange(40) - 19.5)).sum() / turned.sum()
    x = (turned.sum(0) * (torch.arange(80) - 39.5)).sum() / turned.sum()
    assert math.hypot(x, y) == pytest.approx(11, abs=0.2)
    assert abs(math.degrees(math.atan2(y, x))) == pytest.approx(60, abs=1)
    assert float(turned.sum()) == pytest.approx(36 * 255, rel=0.02)


def test_draws_stay_within_their_bounds():
    torch.manual_seed(0)
    picture = torch.zeros(500, 1, 20, 20, dtype=torch.uint8)
    picture[:, :, 9:11, 9:11] = 255
    moved = Smoothing(shift=0.1, angle=0, mirror=False)._augment(picture).float()[:, 0]
    mass = moved.sum((1, 2))
    x = (moved.sum(1) * (torch.arange(20) - 9.5)).sum(1) / mass
    assert float(x.abs().max()) < 2.1 and float(x.std()) > 1  # uniform in [-2, 2]: 1.15


def test_budget_counts_copies(model):
    victim = Victim(model)
    assert Smoothing(**QUICK)(victim, QUERIES[:40], toy_model()).queries == victim.queries == 120
    with pytest.raises(ValueError, match="wanted 3 to 120, 3 copies of each of 40 images, got 121"):
        Smoothing(query_budget=121)(victim, QUERIES[:40], toy_model())
    with pytest.raises(ValueError, match=r"query_budget: wanted 3 to 120, .* got 2$"):
        Smoothing(query_budget=2)(victim, QUERIES[:40], toy_model())


def test_noise_of_single_answers_averages_out(model):
    """What the attack is for: answers that a defense blurs at random."""
    generator = torch.Generator().manual_seed(0)

    def noisy(probs, images):
        noise = torch.rand(probs.shape, generator=generator)
        return (probs + noise / noise.sum(1, keepdim=True)) / 2

    still = Smoothing(copies=9, shift=0, angle=0, mirror=False, query_budget=450, **QUICK)
    errors = []
    for attack in (KnockoffNets(query_budget=50, **QUICK), still):
        transfer_set = attack(Victim(model, defense=noisy), QUERIES, toy_model()).transfer_set
        images, targets = attack._targets(None, *transfer_set)
        clean = Victim(model)(to_float(images))
        errors.append(float((targets - (clean + 0.25) / 2).abs().mean()))
    assert errors[1] < errors[0] / 2
